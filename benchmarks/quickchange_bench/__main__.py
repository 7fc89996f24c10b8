"""Entry point: `python -m quickchange_bench serving …`."""

from quickchange_bench.cli import main

main()
