"""All tables, and the flags of them that the step programs take as they are."""

from __future__ import annotations

from training.migrate.alpaca_rlhf import ALPACA_RLHF
from training.migrate.colossalchat import COLOSSALCHAT
from training.migrate.deepspeed_chat import DEEPSPEED_CHAT
from training.migrate.open_chatgpt import OPEN_CHATGPT
from training.migrate.program import Predecessor
from training.utils.arguments import OtherFlag

PREDECESSORS: tuple[Predecessor, ...] = (DEEPSPEED_CHAT, ALPACA_RLHF, COLOSSALCHAT, OPEN_CHATGPT)
DIRECT = (DEEPSPEED_CHAT, ALPACA_RLHF)  # whose programs have the same names and flags as ours


def others_of(program: str) -> dict[str, OtherFlag]:
    """The flags of predecessors that ``step1``, ``step2``, ``dpo`` or ``step3`` takes; of one name the first one's."""
    programs = [theirs for predecessor in DIRECT for theirs in predecessor.programs if theirs.ours == program]
    return {name: flag for theirs in reversed(programs) for name, flag in theirs.flags.items()}
