"""How is what was found compared with what is recorded, and how is a record written?

Numbers with a fraction may differ as much as rounding on another CPU makes them differ; all else has to be equal.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

RELATIVE, ABSOLUTE = 1e-3, 2e-4
UNCERTAIN = {
    "seconds",
    "evaluation_seconds",
    "samples_per_second",
    "free_bytes",
    "peak_memory_bytes",
    "tokens_per_second",
    "versions",
}
"""Keys whose values depend on the machine, its load or its packages; that they are there is recorded."""

QUANTIZED = {"working", "peak"}
"""Uncertain in an estimate for quantized weights: they depend on the instruction sets of the CPU."""

SMALL = {"learning_rate", "final_learning_rate"}
"""Numbers below the absolute tolerance that no rounding touches."""

DECIMAL = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")
WIDTH = 110


def settle(value: Any) -> Any:
    """A value as it is recorded: floats rounded, what is uncertain left out."""
    if isinstance(value, dict):
        uncertain = UNCERTAIN | QUANTIZED if value.get("quantize") and "resident" in value else UNCERTAIN
        return {key: "..." if key in uncertain else settle(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [settle(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def differences(recorded: Any, found: Any, where: str = "") -> Iterator[str]:
    """One text for each difference: where it is, what is recorded, what was found."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        for key in [*recorded, *(key for key in found if key not in recorded)]:
            place = f"{where} / {key}" if where else str(key)
            if key not in found:
                yield f"{place}\n    is gone; recorded: {show(recorded[key])}"
            elif key not in recorded:
                yield f"{place}\n    is new; found: {show(found[key])}"
            elif key in SMALL and isinstance(recorded[key], float) and isinstance(found[key], float):
                if not math.isclose(recorded[key], found[key], rel_tol=1e-4):
                    yield f"{place}\n    recorded: {recorded[key]}\n    found:    {found[key]}"
            else:
                yield from differences(recorded[key], found[key], place)
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        for index, (one, other) in enumerate(zip(recorded, found, strict=True)):
            yield from differences(one, other, f"{where}[{index}]")
    elif not same(recorded, found):
        yield f"{where}\n    recorded: {show(recorded)}\n    found:    {show(found)}"


def same(recorded: Any, found: Any) -> bool:
    """Equal, or equal but for the last digits of numbers, which may stand in a text."""
    if isinstance(recorded, bool) or isinstance(found, bool):
        return recorded is found
    if isinstance(recorded, float) or isinstance(found, float):
        numbers = isinstance(recorded, int | float) and isinstance(found, int | float)
        return numbers and math.isclose(recorded, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    if isinstance(recorded, str) and isinstance(found, str) and recorded != found:
        if DECIMAL.sub("", recorded) != DECIMAL.sub("", found):
            return False
        pairs = zip(DECIMAL.findall(recorded), DECIMAL.findall(found), strict=True)
        return all(same(float(one), float(other)) for one, other in pairs)
    return bool(recorded == found)


def show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 600 else f"{text[:600]}... ({len(text)} characters)"


def write_json(value: Any, indent: int = 0) -> str:
    """JSON whose lists and objects stand on one line as far as they have room there."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + indent <= WIDTH or not isinstance(value, dict | list) or not value:
        return line
    inner = " " * (indent + 1)
    if isinstance(value, list) and all(isinstance(one, int | float) for one in value):
        rows = [value[start : start + 12] for start in range(0, len(value), 12)]
        lines = [json.dumps(row)[1:-1] for row in rows]
    elif isinstance(value, list):
        lines = [write_json(one, indent + 1) for one in value]
    else:
        lines = [f"{json.dumps(key, ensure_ascii=False)}: {write_json(one, indent + 1)}" for key, one in value.items()]
    start, end = ("{", "}") if isinstance(value, dict) else ("[", "]")
    return start + "\n" + ",\n".join(inner + one for one in lines) + "\n" + " " * indent + end
