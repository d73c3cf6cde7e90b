"""The HTTP layer: routes, middleware, uploads, schemas and the OpenAPI document."""
