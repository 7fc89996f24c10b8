"""The fake engine, spelling markup that would do harm if it became part of a page."""

from __future__ import annotations

from multiprocessing.connection import Connection

import fake_engine
from fake_engine import Behaviour, FakeEngine, Sequence

from quickchange_server.config import Settings
from quickchange_server.protocol import Delta

SPELLED = '<img src=x onerror="window.hurt=1"><script>window.hurt=2</script>&lt;b&gt; é'


class SpellingEngine(FakeEngine):
    """Emits the bytes of SPELLED, whatever it is asked."""

    def advance(self, key: str) -> Delta:
        sequence: Sequence = self.sequences[key]
        position = sequence.emitted
        delta = super().advance(key)
        tokens = SPELLED.encode()[position : position + len(delta.token_ids)]
        return delta._replace(token_ids=tuple(tokens))


def main(connection: Connection, settings: Settings, behaviour: Behaviour) -> None:
    fake_engine.FakeEngine = SpellingEngine  # type: ignore[misc]
    fake_engine.main(connection, settings, behaviour)
