"""All that the package uses of Keras's and TensorFlow's private API, and nothing else.

The rest of the package calls `_keras.name(...)` and uses no private name itself. A docstring names
the private API that its function uses. All of it was run on every version in `_installation.py`,
from the oldest to the newest, so a docstring names a version only where versions differ.

Modules here import each other directly, and in this order only:

- `training`, `layers`, `optimizers`, `execution`: one-line accessors.
- `graphs`: reading functional graphs, and replacing layers.
- `layer_pairs`, `model_copies`, `optimizer_copies`: copies of models and optimizers.
- `substitutions`, `substitutes`: changes that last for a `with` block.
- `patches`: changes that last.
- `wrapping`: private questions that a model wrapper answers for the model in it.
"""

from gradient_accumulator_tf._keras.execution import (
    assign_on_replica,
    compiles_with_xla,
    data_of_trace,
    is_parameter_server,
    replica_local,
    replicas_need_no_merge_call,
)
from gradient_accumulator_tf._keras.graphs import (
    Graph,
    GraphNode,
    attributes_of,
    become,
    graph_of,
    has_graph,
    held_layers,
    held_layers_by_path,
    is_functional,
    is_plain_functional,
    own_attributes,
    packed_outputs,
    replace_layers,
    standardized_inputs,
)
from gradient_accumulator_tf._keras.layers import (
    adopt_call_arguments,
    all_layers,
    batch_moments,
    call_has_training_argument,
    keras_logits,
    keras_mask,
    outside_graph,
    set_keras_logits,
    set_keras_mask,
    sublayers,
)
from gradient_accumulator_tf._keras.optimizer_copies import copied_optimizer, rebuilt_optimizer
from gradient_accumulator_tf._keras.optimizers import (
    gradients_over_replicas,
    innermost,
    moving_averages,
    strategy_of,
    variable_key,
)
from gradient_accumulator_tf._keras.patches import (
    mend_fit_on_several_workers,
    route_loss_scaling,
    scaler_around,
)
from gradient_accumulator_tf._keras.substitutes import (
    activity_regularizers_by_rank,
    added_losses_of_each_replica,
    compiled_without,
    recorded_vectors,
    replaced_added_losses,
    replaced_losses,
    replaced_updates,
    replicas_agree,
)
from gradient_accumulator_tf._keras.training import (
    TRAINER_ATTRIBUTES,
    added_losses,
    build_for_training,
    clear_added_losses,
    compile_arguments,
    compiled_metrics,
    compute_loss,
    metric_function,
    per_output_loss_metrics,
    set_backup_epoch,
    track_loss,
    trainer_methods,
    update_compiled_metrics,
    use_backup_folder,
)
from gradient_accumulator_tf._keras.wrapping import AnswersForModel

__all__ = [
    "TRAINER_ATTRIBUTES",
    "AnswersForModel",
    "Graph",
    "GraphNode",
    "activity_regularizers_by_rank",
    "added_losses",
    "added_losses_of_each_replica",
    "adopt_call_arguments",
    "all_layers",
    "assign_on_replica",
    "attributes_of",
    "batch_moments",
    "become",
    "build_for_training",
    "call_has_training_argument",
    "clear_added_losses",
    "compile_arguments",
    "compiled_metrics",
    "compiled_without",
    "compiles_with_xla",
    "compute_loss",
    "copied_optimizer",
    "data_of_trace",
    "gradients_over_replicas",
    "graph_of",
    "has_graph",
    "held_layers",
    "held_layers_by_path",
    "innermost",
    "is_functional",
    "is_parameter_server",
    "is_plain_functional",
    "keras_logits",
    "keras_mask",
    "mend_fit_on_several_workers",
    "metric_function",
    "moving_averages",
    "outside_graph",
    "own_attributes",
    "packed_outputs",
    "per_output_loss_metrics",
    "rebuilt_optimizer",
    "recorded_vectors",
    "replace_layers",
    "replaced_added_losses",
    "replaced_losses",
    "replaced_updates",
    "replica_local",
    "replicas_agree",
    "replicas_need_no_merge_call",
    "route_loss_scaling",
    "scaler_around",
    "set_backup_epoch",
    "set_keras_logits",
    "set_keras_mask",
    "standardized_inputs",
    "strategy_of",
    "sublayers",
    "track_loss",
    "trainer_methods",
    "update_compiled_metrics",
    "use_backup_folder",
    "variable_key",
]
