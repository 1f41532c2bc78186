"""Names of the files in the output directory of a training run, for those who write and those who read them.

adapter_config.json, adapter_model.safetensors, …   the adapter
README.md            the run's model card; ``e5v push`` writes the repository's own
recipe.yaml          all arguments of the run, as a recipe
evaluation.json      scores by name: {"before": {…}, "after": {…}}
loss.png             the loss, and the scores during training, over the steps
log_history.json     all that the trainer logged
checkpoint-STEP/     what ``--resume`` continues from
"""

from __future__ import annotations

CARD = "README.md"
RECIPE = "recipe.yaml"
EVALUATION = "evaluation.json"
PLOT = "loss.png"
LOG = "log_history.json"

#: What ``e5v push`` makes the repository's card from, and uploads.
RUN_FILES = (RECIPE, EVALUATION, PLOT)
