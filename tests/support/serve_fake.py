"""`quickchange serve` over the fake engine: python serve_fake.py STEP_SECONDS REFUSAL OPTION…

The option start_seconds=N is the engine's time until it is ready; the others are settings.
"""

from __future__ import annotations

import sys
from functools import partial

import fake_engine
from fake_engine import Behaviour

if __name__ == "__main__":
    from quickchange_server.entrypoints import (
        serve,  # here: the engine's process imports this file too
    )

    step_seconds, refusal, *options = sys.argv[1:]
    given = dict(option.split("=", 1) for option in options)
    behaviour = Behaviour(
        step_seconds=float(step_seconds),
        start_seconds=float(given.pop("start_seconds", "0")),
        refusal=refusal or None,
    )
    serve.serve(given, demo=False, engine=partial(fake_engine.main, behaviour=behaviour))
