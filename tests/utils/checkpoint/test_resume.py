"""A run that is taken up; what becomes of killed ones is in tests/reliability."""

import pytest

from training.utils.arguments import ReliabilityArguments
from training.utils.checkpoint.resume import Run
from training.utils.errors import UserError


def test_a_checkpoint_that_went_while_the_model_was_loaded_is_named(tmp_path):
    """A run that is at work in the folder of ``--resume PATH`` replaces it by the next one."""
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    run = Run(tmp_path / "new", ReliabilityArguments(), {"batches": {}}, checkpoint, {"engines": {"model": {}}})
    with pytest.raises(UserError, match="step-00000002 is gone: is another run at work there"):
        run.load({"model": None})
