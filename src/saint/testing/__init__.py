"""The contracts every pruned model must keep, as functions to run on your own model.

The definition of correct is *masked-oracle equality*: a pruned forward equals the unpruned-length forward in which each
dropped token is hidden, as a key, from every attention behind its drop point. The oracle here shares no code with the
pruning path: it knows the model's attention only through torch's own functions. Methods that merge have an oracle of their
own: the full-length forward in which tokens that became one share their mean.

Letters: B batch, P protected tokens, N candidates, C channels.
"""

from .contracts import (
    CONTRACTS,
    Result,
    check_bad_input,
    check_batch,
    check_identity,
    check_model,
    check_on,
    check_oracle,
    check_undo,
    outcomes,
    snapshot,
)
from .examples import example_inputs, example_plan
from .merging import merged_oracle
from .oracle import masked_oracle
from .outputs import Inputs, run, tensors
from .removal import holes_oracle, removal_oracle

__all__ = [
    "CONTRACTS",
    "Inputs",
    "Result",
    "check_bad_input",
    "check_batch",
    "check_identity",
    "check_model",
    "check_on",
    "check_oracle",
    "check_undo",
    "example_inputs",
    "example_plan",
    "holes_oracle",
    "masked_oracle",
    "merged_oracle",
    "outcomes",
    "removal_oracle",
    "run",
    "snapshot",
    "tensors",
]
