"""Small results that were never measured, for the tests of reports: every suite and status, and odd ones."""

from dataclasses import replace

from flux_quant.benchmarks.bench.record import EMULATED, PREDICTED, REPORTED, SKIPPED, Row, Run

FORMATS = {"q4_k_s": (4.59, 25.1), "q8_0": (8.5, 44.8), "bf16": (16.0, None)}
GB = 10**9


def run(suite: str, rows: list[Row], device: str = "Test Card 9000", date: str = "2026-01-02T03:04:05+00:00") -> Run:
    return Run(
        suite,
        f"flux-quant bench {suite}",
        date,
        {"kind": "random", "name": "FLUX.1 [dev]"},
        {"device": device, "pcie": {"generation": 4, "width": 16}, "throttle": ["power cap", "none"], "driver": None},
        {"pinned_gb_per_s": 24.5, "gemm_tflop_per_s": 70.25},
        rows,
    )


def samples(middle: float, shift: float = 1.0) -> list[float]:
    return [middle * shift * (1 + 0.01 * i) for i in (-2, 1, 0, -1, 2)]


def step_rows(shift: float = 1.0) -> list[Row]:
    """Formats by tiers: the largest is measured, others are emulated; one does not fit, one is unstable."""
    rows = []
    for i, (form, (bits, _)) in enumerate(FORMATS.items()):
        for vram in (6 * GB, 8 * GB, 24 * GB):
            what = {"format": form, "vram": f"{vram // GB}GB", "size": "1024x1024", "steps": 4}
            rerun = f"flux-quant bench step --formats {form} --vram {vram // GB}GB"
            bound = 0.4 + 0.05 * i
            row = Row(what, samples={"seconds": samples(bound * 1.2, shift)}, rerun=rerun)
            row.values = {
                "bits_per_weight": bits,
                "moved_bytes": int((24 * GB - vram) * bits / 24),
                "stall_seconds": 0.01,
            }
            row.memory = {"allocated": vram - GB, "device": vram, "host_rss": 3 * GB}
            row.expected = {"predicted_seconds": bound * 1.1, "bound_seconds": bound, "bound_by": "compute"}
            row.status = "measured" if vram == 24 * GB else EMULATED
            rows.append(row)
    rows[2].samples["seconds"] = [0.4, 0.5, 0.9, 0.41, 1.5]
    rows[6] = replace(rows[6], status=SKIPPED, samples={}, values={}, memory={}, note="needs 6.9 GB | has 6.0 GB")
    return rows


def tier_rows() -> list[Row]:
    """As the suite has them: one format of a card, and what others report."""
    rows = [
        Row(
            {"tier": f"{vram} GB", "card": card, "setting": setting, "format": "q4_k_s" if vram < 12 else "q8_0"},
            values={"fits": vram > 4, "picture_seconds": 200 / vram, "bytes_moved": 5 * GB, "stall_seconds": 0.5},
            memory={"device": vram * GB},
            expected={"predicted_seconds": 40 * scale / vram, "bound_seconds": 30 / vram, "bound_by": "compute"},
            status=PREDICTED,
            rerun=f"flux-quant plan flux1-dev --gpu {card}",
        )
        for setting, scale in (("512x512, schnell, 4 steps", 1), ("1024x1024, dev, 20 steps", 3))
        for card, vram in (("GTX 1050 Ti", 4), ("RTX 4060", 8), ("RTX 3060", 12))
    ]
    cpu = Row({"tier": "CPU only", "card": "any processor", "setting": "512x512, schnell, 4 steps"}, status=PREDICTED)
    cpu.expected = {"bound_seconds": 90.0, "bound_by": "compute"}
    what = {"tier": "12 GB", "card": "RTX 3060", "setting": "step", "size": "1024x1024", "format": "NF4"}
    values = {"step_seconds": 4.2, "step_seconds_most": 5.1, "source": "https://example.org/thread/1"}
    return [*rows, cpu, Row(what, "another program 1.0", values=values, status=REPORTED, note="as its author says")]


def quality_rows() -> list[Row]:
    return [
        Row(
            {"part": "format", "format": form, "compute": "16-bit", "model": "shipped"},
            values={
                "bits_per_weight": bits,
                "psnr_db": bits * 4,
                "psnr_db_low": bits * 3.9,
                "psnr_db_high": bits * 4.1,
                "psnr_db_worst": bits * 3,
                "psnr_db_floor": 80.0,
                "weight_snr_db": snr,
            },
        )
        for form, (bits, snr) in FORMATS.items()
    ]


def convert_rows(shift: float = 1.0) -> list[Row]:
    return [
        Row(
            {"format": form, "source_bytes": 23_802_903_488},
            subject,
            samples={"seconds": samples(20 * factor + i, shift)},
            values={"gb_per_s": 23.8 / (20 * factor + i)},
            memory={"host_rss": 700_000_000},
            rerun="flux-quant bench convert",
        )
        for subject, factor in (("flux_quant", 1), ("gguf-py 0.18", 9))
        for i, form in enumerate(FORMATS)
    ]


def peer_rows() -> list[Row]:
    case = {"format": "q8_0", "size": "512x512"}
    return [
        Row(case, samples={"seconds": samples(2.0)}),
        Row(case, "diffusers 0.42.1 GGUF", samples={"seconds": samples(3.0)}),
        Row(case, "bitsandbytes", status=SKIPPED, note="needs CUDA"),
    ]


def all_runs() -> dict[str, Run]:
    """file -> run"""
    suites = {
        "step": step_rows(),
        "tiers": tier_rows(),
        "quality": quality_rows(),
        "convert": convert_rows(),
        "peers": peer_rows(),
        "novelty": [Row({"case": "a suite nobody knows"}, values={"answer": 42})],
    }
    return {f"2026-01-02-{suite}.json": run(suite, rows) for suite, rows in suites.items()}
