"""`quickchange serve` over the fake engine: python serve_fake.py STEP_SECONDS REFUSAL OPTION…"""

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
    behaviour = Behaviour(step_seconds=float(step_seconds), refusal=refusal or None)
    given = dict(option.split("=", 1) for option in options)
    serve.serve(given, demo=False, engine=partial(fake_engine.main, behaviour=behaviour))
