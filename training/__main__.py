"""``python -m training`` is ``robust train``: what torchrun starts on every GPU."""

from robust.commands.running import main
from training.commands import train

main(train, name="training")
