"""Where a model's graph is cut, so that its barriers can wait for a whole effective batch.

Stage 0 holds what depends on no barrier's output. Stage s + 1 holds what depends on a barrier whose
inputs are in stage s, and on none with inputs in a later stage. Each stage can run over all
micro-batches, one after the other, once the stages before it have.
"""

import dataclasses

from gradient_accumulator_tf.stages.graph import layers_of, states_of, unique
from gradient_accumulator_tf.stages.recomputation import cheap_to_recompute


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """What runs over all micro-batches before the next stage does.

    Attributes:
        nodes: List of `Node` in the order to run them in.
        inputs: List of the model's inputs that are read here.
        reads: List of the tensors that earlier stages kept.
        keeps: List of the tensors that later stages read.
        contributes: List of the nodes whose barriers get their contributions here.
        applies: List of the nodes whose barriers are applied here.
        results: List of all that is wanted of the stage: `keeps`, the inputs of `contributes` and,
            of the last stage, the model's outputs.
        variables: List of the trainable variables in use.
        states: List of the variables that layers draw random numbers with.
    """

    nodes: list
    inputs: list
    reads: list
    keeps: list
    contributes: list
    applies: list
    results: list
    variables: list
    states: list


def cut(graph):
    """The stages of a graph, first to last; a single one without barriers.

    Args:
        graph: `Graph`.

    Returns:
        List of `Stage`.
    """
    producers = {output: node for node in graph.nodes for output in node.outputs}
    level = _levels(graph)
    cheap = cheap_to_recompute(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}

    number = max(level.values()) + 1
    contributes = [[] for _ in range(number)]
    for node in graph.nodes:
        if node.barrier:
            contributes[max(level[i] for i in node.inputs)].append(node)
    # What a stage reads is wanted of earlier ones, so the last stage comes first.
    keeps, stages = [{} for _ in range(number)], []
    for s in reversed(range(number)):
        results = dict.fromkeys(keeps[s])
        results |= dict.fromkeys(i for node in contributes[s] for i in node.inputs)
        if s == number - 1:
            results |= dict.fromkeys(graph.outputs)
        nodes, inputs, reads, seen = set(), [], {}, set()
        waiting = list(results)
        while waiting:
            tensor = waiting.pop()
            if tensor in seen:
                continue
            seen.add(tensor)
            if tensor in graph.inputs:
                inputs.append(tensor)
            elif level[tensor] == s or tensor in cheap:
                nodes.add(producers[tensor])
                waiting += producers[tensor].inputs
            else:
                reads[tensor] = None
                keeps[level[tensor]][tensor] = None
        nodes = sorted(nodes, key=order.get)
        stages.append(
            Stage(
                nodes=nodes,
                inputs=inputs,
                reads=list(reads),
                keeps=list(keeps[s]),
                contributes=contributes[s],
                applies=[node for node in nodes if node.barrier],
                results=list(results),
                variables=unique(
                    v for layer in layers_of(nodes) for v in layer.trainable_variables
                ),
                states=states_of(nodes),
            )
        )
    return stages[::-1]


def _levels(graph):
    """Dict of the number of the stage that computes a tensor first."""
    level = dict.fromkeys(graph.inputs, 0)
    for node in graph.nodes:
        highest = max((level[i] for i in node.inputs), default=0)
        level.update(dict.fromkeys(node.outputs, highest + (node.barrier is not None)))
    return level
