"""An exported PyTorch program (torch.export.save) -> float32 TFLite with litert-torch.

Request: ``model`` (file), ``channels_last`` and ``outputs_channels_last``: for each input and each
output in the program's order, whether its second axis becomes the last one in the TFLite file.
Answer: ``tflite`` (file, relative).
"""

from child import serve


def convert(request):
    import litert_torch
    import torch
    from torch.utils import _pytree

    program = torch.export.load(request["model"])
    shapes = {
        node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"
    }
    names = program.graph_signature.user_inputs
    module = program.module()
    keep_pooled_axes(module)
    detach_out_of_place(module)

    class Doors(torch.nn.Module):
        """The program, its images channels last as TFLite's operators want them."""

        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, *inputs):
            # (N, ..., C) -> (N, C, ...)
            moved = [
                x.movedim(-1, 1) if last else x
                for x, last in zip(inputs, request["channels_last"], strict=True)
            ]
            args, kwargs = _pytree.tree_unflatten(moved, program.call_spec.in_spec)
            outputs = _pytree.tree_leaves(self.inner(*args, **kwargs))
            lasts = request["outputs_channels_last"]
            return tuple(
                y.movedim(1, -1) if last else y for y, last in zip(outputs, lasts, strict=True)
            )

    samples = []
    for name, last in zip(names, request["channels_last"], strict=True):
        shape = list(shapes[name].shape)
        if last:
            shape.append(shape.pop(1))
        samples.append(torch.zeros(shape, dtype=shapes[name].dtype))
    litert_torch.convert(Doors(), tuple(samples)).export("model.tflite")
    return {"tflite": "model.tflite"}


def keep_pooled_axes(module):
    """Write means over height and width as litert-torch's layout pass follows them.

    ``x.mean((2, 3))`` becomes ``x.mean((2, 3), keepdim=True).flatten(1)``, the same values: the
    first form keeps NCHW and costs a TRANSPOSE of the whole of x (edgepipe does the same for ONNX).
    """
    import torch

    for node in list(module.graph.nodes):
        if node.target is not torch.ops.aten.mean.dim or len(node.args) < 2:
            continue
        x, axes = node.args[:2]
        keepdim = len(node.args) > 2 and node.args[2]
        rank = x.meta["val"].dim() if "val" in x.meta else 0
        if keepdim or rank != 4 or {axis % rank for axis in axes} != {2, 3}:
            continue
        node.args = (x, axes, True)  # (N, C, H, W) -> (N, C, 1, 1) -> (N, C)
        with module.graph.inserting_after(node):
            flat = module.graph.call_function(torch.ops.aten.flatten.using_ints, (node, 1))
        flat.meta = dict(node.meta)
        node.replace_all_uses_with(flat, delete_user_cb=lambda user, flat=flat: user is not flat)
    module.recompile()


def detach_out_of_place(module):
    """``torch.tensor([..])`` in forward is captured with a ``detach_``, which fails on views: ``detach``, then."""
    import torch

    for node in module.graph.nodes:
        if node.target is torch.ops.aten.detach_.default:
            node.target = torch.ops.aten.detach.default
    module.recompile()


if __name__ == "__main__":
    serve(convert)
