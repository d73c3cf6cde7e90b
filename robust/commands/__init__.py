"""The commands that work on a checkpoint.

Nothing here imports torch before a command runs, so that `--help` is fast.
"""

import click

from robust.commands.attack import attack
from robust.commands.certify import certify
from robust.commands.evaluate import evaluate
from robust.commands.export import export
from robust.commands.predict import predict
from robust.commands.report import report

commands: list[click.Command] = [predict, attack, evaluate, certify, report, export]
