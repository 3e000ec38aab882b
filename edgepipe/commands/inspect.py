"""``edgepipe inspect``: what is inside a .tflite file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.cli import Output
from edgepipe.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgepipe.tflite_ops.flatbuffer import Subgraph, Tensor
    from edgepipe.tflite_ops.inspect import ModelDescription


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show operators, tensors, dtypes, scales, sizes, MACs, transposes and float islands of a\n"
        "TFLite file, without running it.\n\n"
        "  edgepipe inspect model.tflite\n"
        "  edgepipe inspect model.tflite --tensors\n"
        "  edgepipe inspect model.tflite --sparsity\n"
        "  edgepipe inspect model.tflite --profile rpi4b_4gb\n"
        "  edgepipe inspect merged.tflite --signature length16\n"
        "  edgepipe inspect model.tflite --json"
    )
    parser.add_argument("model", type=Path, metavar="MODEL.tflite", help="the file to look into")
    parser.add_argument("--signature", default="", metavar="NAME", help="only this one of a file of several (default: each, and the file as a whole)")  # fmt: skip
    parser.add_argument("--tensors", action="store_true", help="list every tensor with dtype, shape, scale and zero point")  # fmt: skip
    parser.add_argument("--sparsity", action="store_true", help="say whether zeros in the weights make it faster, and what it weighs compressed")  # fmt: skip
    parser.add_argument("--profile", metavar="NAME", help="predict its latency on a board that this device profile describes")  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    from edgepipe.errors import RequestError
    from edgepipe.tflite_ops.inspect import as_dict, by_signature, describe

    description = describe(args.model, signature=args.signature)
    several = by_signature(description.model)
    if args.profile and several:
        raise RequestError(
            f"--profile predicts one inference, and {args.model} has several signatures",
            hint=f"choose one with --signature: {', '.join(several)}",
        )
    data = {"path": str(args.model), **as_dict(description, several, tensors=args.tensors)}
    out.text(render(description, several, args.model, tensors=args.tensors))
    if args.sparsity:
        from edgepipe.tflite_ops import sparse

        report = sparse.check_sparsity(args.model.read_bytes(), where=str(args.model))
        first, *rest = sparse.sparsity_lines(report)
        out.text("\n".join([f"  sparsity     {first}", *(f"    {line}" for line in rest)]))
        data["sparsity"] = sparse.as_dict(report)
    if args.profile:
        from edgepipe.op_table import estimate_tflite, load_op_table
        from edgepipe.profile import find_profile
        from edgepipe.resources import profile_paths

        table = load_op_table(Path(args.store), find_profile(args.profile, profile_paths()))
        predicted = estimate_tflite(description.model, table)
        out.text(f"  latency      {predicted.text()}")
        data["predicted_latency"] = {
            "seconds": predicted.latency_s, "profile": table.profile, "operators": table.source,
            "error": table.error, "guessed": sorted(set(predicted.guessed)),
        }  # fmt: skip
    out.json(data)
    return 0


def render(
    description: ModelDescription,
    several: Mapping[str, ModelDescription],
    path: Path,
    *,
    tensors: bool,
) -> str:
    """The description as text for people; of ``several`` signatures, what each costs."""
    model = description.model
    lines = [f"{path}: {format_bytes(model.size_bytes)} ({model.size_bytes} bytes)"]
    if model.description:
        lines.append(f"  made by      {model.description}")
    for graph in model.subgraphs:
        title = f" (subgraph {graph.name or '?'})" if len(model.subgraphs) > 1 else ""
        for word, indices in (("input", graph.inputs), ("output", graph.outputs)):
            lines += [f"  {word:<12} {_tensor_text(graph.tensors[i])}{title}" for i in indices]
    for signature in model.signatures:
        names = ", ".join([*signature.inputs, "->", *signature.outputs]).replace(", ->,", " ->")
        lines.append(f"  signature    {signature.key}: {names}")
        if signature.key in several:
            lines += [f"  {line}" for line in _cost_lines(several[signature.key])]
    if several:
        lines.append(f"  weights      {format_bytes(description.weight_bytes)} in all")
    else:
        lines += _cost_lines(description)
    if tensors:
        for graph in model.subgraphs:
            lines += ["", *_tensor_table(graph)]
    return "\n".join(lines)


def _cost_lines(description: ModelDescription) -> list[str]:
    """What one inference does."""
    return [
        f"  MACs         {description.macs:,}"
        + _shares(description.macs_by_operator, description.macs),
        f"  weights      {format_bytes(description.weight_bytes)}",
        f"  activations  {format_bytes(description.activation_bytes)} in all"
        " (the arena shares their space)",
        f"  operators    {sum(description.operators.values())}: {_counts(description.operators)}",
        f"  dtypes       {_counts(description.dtypes)}",
        f"  transposes   {description.transposes}"
        + (f", moving {format_bytes(description.transpose_bytes)}" if description.transposes else ""),
        *_integer_lines(description),
    ]  # fmt: skip


def _integer_lines(description: ModelDescription) -> list[str]:
    total = sum(description.operators.values())
    if description.is_full_integer:
        doors = f", but for {'; '.join(description.doors)}" if description.doors else ""
        return [f"  integer      every operator{doors}"]
    integer = total - sum(len(island.operators) for island in description.float_islands)
    if integer == 0:
        return ["  integer      none: a float model"]
    lines = [f"  integer      {integer} of {total} operators; float islands:"]
    for island in description.float_islands:
        lines.append(f"    {' - '.join(island.names)}  -> {island.output}")
    return lines


def _shares(parts: Mapping[str, int], total: int) -> str:
    if not total:
        return ""
    return " (" + ", ".join(f"{k} {100 * v / total:.0f} %" for k, v in parts.items()) + ")"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _tensor_text(tensor: Tensor) -> str:
    return f"{tensor.name or '(no name)'}  {list(tensor.shape)} {tensor.dtype}{_scale_text(tensor)}"


def _scale_text(tensor: Tensor) -> str:
    if not tensor.scales:
        return ""
    if len(tensor.scales) == 1:
        zero_point = tensor.zero_points[0] if tensor.zero_points else 0
        return f"  scale {tensor.scales[0]:.6g}, zero point {zero_point}"
    low, high = min(tensor.scales), max(tensor.scales)
    return f"  {len(tensor.scales)} scales {low:.3g} to {high:.3g} on axis {tensor.quantized_axis}"


def _tensor_table(graph: Subgraph) -> list[str]:
    rows = [("#", "dtype", "shape", "bytes", "kind", "name", "quantization")]
    for tensor in graph.tensors:
        kind = "constant" if tensor.is_constant else "variable" if tensor.is_variable else ""
        rows.append((
            str(tensor.index), tensor.dtype, "x".join(map(str, tensor.shape)) or "scalar",
            str(tensor.size_bytes), kind, tensor.name, _scale_text(tensor).strip(),
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[6]]).rstrip()
        for row in rows
    ]
