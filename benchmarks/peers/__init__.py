"""Published implementations of the ops: `PEERS[op][name]`, with the names that `--against` takes.

Nothing is imported before a peer is loaded: `installed(peer)` gives its function and version, or why there is none.
"""

from __future__ import annotations

from . import assignment, contrastive, late_interaction
from .peer import Peer as Peer
from .peer import installed as installed

PEERS: dict[str, dict[str, Peer]] = {**contrastive.PEERS, **late_interaction.PEERS, **assignment.PEERS}
