"""The modules of an engine, for the process from which engines are forked.

Importing them is most of what a start takes, and this process does it once. Nothing here runs the
model: no thread is started, and no device is touched, so that a fork is safe.
"""

from __future__ import annotations

import gc
import importlib
import logging
import signal

from quickchange_server.workers.process_memory import release_unused_memory

# A signal to the whole service must not end it: it waits for the engines, which end later.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)

for _name in ("torchao", "torch.utils._pytree"):  # they warn of GPU parts while imported
    logging.getLogger(_name).setLevel(logging.ERROR)

for _name in (
    "quickchange_server.engine.process",
    "quickchange_server.frontend.tokenizer",
    "quickchange_server.structured_output.grammar",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",  # whose parts most models share
):
    importlib.import_module(_name)

# A collection in an engine would write to every object of these, and so copy their pages.
gc.collect()
gc.freeze()
release_unused_memory()
