-- Script for wrk: wrk -s load.lua URL -- BODY_FILE BOUNDARY
-- Sends the body as a form, and prints one line of JSON after wrk's own report.

local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  local file = assert(io.open(args[1], "rb"))
  wrk.method = "POST"
  wrk.body = file:read("*a")
  wrk.headers["Content-Type"] = "multipart/form-data; boundary=" .. args[2]
  file:close()
  statuses = {}
end

function response(status)
  statuses[status] = (statuses[status] or 0) + 1
end

function done(summary, latency)
  local counts = {}
  for _, thread in ipairs(threads) do
    for status, count in pairs(thread:get("statuses")) do
      counts[status] = (counts[status] or 0) + count
    end
  end
  local fields = {}
  for status, count in pairs(counts) do
    table.insert(fields, string.format('"%d": %d', status, count))
  end
  local broken = summary.errors.connect + summary.errors.read + summary.errors.write
  print(string.format(
    '{"seconds": %.3f, "p50_ms": %.3f, "p99_ms": %.3f, "broken": %d, "timeouts": %d, "statuses": {%s}}',
    summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    broken, summary.errors.timeout, table.concat(fields, ", ")))
end
