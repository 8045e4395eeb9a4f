"""The page of the study of non-uniform scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from growkernels.experiments import report
from growkernels.experiments.image_study import LOSSY_IMAGES, is_lossy
from growkernels.experiments.report import Figures, Plot, Section
from growkernels.experiments.scaling import plots
from growkernels.experiments.scaling.claims import RULE
from growkernels.experiments.scaling.results import Results, parameters
from growkernels.experiments.scaling.settings import Setting
from growkernels.experiments.statistics import Claim

TITLE = "Beyond uniform scaling: a DeiT that grows where its splitting matrices say so"

DEVIATIONS = (
    "Criterion: the paper describes the smallest eigenvalue of S2D's splitting matrix; the code "
    "takes the gradient of the last mini-batch and sums each neuron's row of it, which is the "
    "only eigenvalue of what it builds that is not zero. Here 'splitting' is the curvature of the "
    "branch that would be added, 's2d' the neuron's own (zero except for fc1, so only fc1 grows), "
    "'gradient_sum' what the code computes.",
    "Scores come from several batches, not from the last one.",
    "Growth is the paper's: two neurons of opposite sign beside each chosen one, with their GELU. "
    "The widening of v, q, k and fc1 in the authors' code is left out, because as published it "
    "changes the function, and it is not known which version the paper's numbers come from.",
    "A pair's halves receive the same gradient, and the pair starts as a sum of zero whatever its "
    "direction. So its initial direction has no effect, and the eigenvector is compared with the "
    "parent in gated neurons, gate * (GELU(a x) + a x), in which it has.",
    "Which neurons: the authors open at most three layers of a category (fc1, fc2, proj) or seven "
    "(q, k, v) per step; here every layer with enough eligible neurons is open.",
    "Budget: proportional to the learning rate of the moment, as in the authors' code, but scaled "
    "so that all steps together reach the final size, which the authors' published one cannot.",
    "Data: images lie decoded on the device. Large images are stored as the middle square of 256 "
    "pixels, from which the 224 pixels are cropped, so a crop never shows what lies beside the "
    "square. Augmentation runs there on whole batches: RandAugment (m9, std 0.5, increasing) with "
    "bilinear interpolation instead of a random choice, one Beta draw per batch for mixing as in "
    "timm. Colour jitter is left out, as DeiT's own settings do beside RandAugment. Images of up "
    "to 64 pixels are tested whole, not as the middle 87.5 %.",
    "All variants of a run see the same batches, and grown variants share the reduced network's "
    "training up to their first growth.",
    "Seeds: the authors fix one; here every run has its own.",
)


def draw_plots(setting: Setting, results: Results) -> dict[str, Plot]:
    """All figures, by file name."""
    return {
        "accuracy_by_parameters": Plot(
            plots.accuracy_by_parameters(setting, results),
            "Final accuracy against size. Squares keep their size, discs grow during training. "
            "Variants of about one size stand side by side.",
        ),
        "accuracy": Plot(
            plots.curves(setting, results, "top1"),
            "Accuracy after each epoch; bands show one standard error over the runs, dashed lines "
            "the growth steps of the usual interval.",
        ),
        "training_loss": Plot(
            plots.curves(setting, results, "loss"), "Training loss, drawn in the same way."
        ),
        "where_grown": Plot(
            plots.where_grown(results),
            "Where neurons were added: block and layer against time, mean over the runs. A "
            "branch's neurons count for the layer that it belongs to.",
        ),
        "spectra": Plot(
            plots.spectra(results),
            "Smallest eigenvalue of every neuron's splitting matrix at each growth step (variant "
            "splitting, first run): median and 5 to 95 % of a layer's neurons. Below zero there is "
            "a direction of descent that the neuron lacks.",
        ),
        "growth_cost": Plot(
            plots.growth_cost(setting, results), "What growth adds to the training time."
        ),
    }


def render(
    setting: Setting,
    results: Results,
    claims: Sequence[Claim],
    drawn: Mapping[str, Plot],
    summary: Mapping[str, Any],
) -> str:
    """The whole page."""
    sections = [
        _conditions(setting, summary),
        report.pictures(drawn),
        _final_values(setting, results, summary),
        _costs(setting, summary),
        report.differences(DEVIATIONS),
        _how_to(summary),
    ]
    return report.render(TITLE, summary["overview"], claims, RULE, sections, summary["environment"])


def _conditions(setting: Setting, summary: Mapping[str, Any]) -> Section:
    section = Section("Under which conditions")
    data, recipe, net = summary["data"], setting.recipe, setting.architecture
    section.text(
        f"Data: {data['name']}, {data['train_images']:,} training and {data['test_images']:,} test "
        f"images of {data['size']} pixels."
    )
    if is_lossy(data):
        section.text(LOSSY_IMAGES)
    section.text(
        f"Network: DeiT, {net.embed} features, {net.depth} blocks, {net.heads} heads, patches of "
        f"{net.patch} of {net.image_size} pixels; q, k, v and fc1 start at half their width."
    )
    mixing = f"mixup {recipe.mixup:g}, CutMix {recipe.cutmix:g}" if recipe.mixup else "no mixing"
    section.text(
        f"Training: {setting.epochs} epochs, batches of {recipe.batch}, AdamW, peak learning rate "
        f"{recipe.rate:g} after {recipe.warmup_epochs:g} epochs of warm-up, cosine to "
        f"{recipe.final_rate:g}, weight decay {recipe.weight_decay:g}, label smoothing "
        f"{recipe.smoothing:g}, drop path {recipe.drop_path:g}, {mixing}, random erasing "
        f"{recipe.erasing:g}, {'RandAugment' if recipe.rand_augment else 'no RandAugment'}, "
        f"{'resized crops' if recipe.resized_crops else 'shifted crops'} and mirroring, "
        f"{recipe.repeats} view{'s' * (recipe.repeats > 1)} of an image in a batch. "
        f"First growth before epoch {setting.first_growth + 1}, scores from "
        f"{setting.growth_rows:,} tokens of {setting.growth_batches} batches; {setting.runs} runs."
    )
    if summary["reduced"]:
        section.text(summary["reduced"])
    return section


def _final_values(setting: Setting, results: Results, summary: Mapping[str, Any]) -> Section:
    section = Section("Final values")
    rows = []
    for variant in setting.variants:
        value = summary["variants"][variant.name]
        sizes = sorted({int(count) for count in parameters(results[variant.name])})
        rows.append(
            [
                variant.name,
                variant.title,
                Figures(" to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))),
                Figures(f"{max(value['flops_per_image']) / 1e6:,.1f}"),
                Figures(f"{value['top1_mean']:.2f} ± {value['top1_sem']:.2f}"),
                Figures(f"{value['top5_mean']:.2f} ± {value['top5_sem']:.2f}"),
                Figures(f"{value['loss_mean']:.3f} ± {value['loss_sem']:.3f}"),
                Figures(f"{value['seconds']:.1f}"),
            ]
        )
    section.table(
        ["Variant", "", "Parameters", "MFLOP per image", "Top-1, %", "Top-5, %", "Training loss",
         "Seconds, all runs"],
        rows,
    )  # fmt: skip
    section.text(
        "Mean ± standard error of the last three epochs. Operations: of one image's forward pass "
        "through the final network, two per multiply-add; the largest of the runs. Seconds: of "
        "training without growth and tests; the stretch before the first growth, which grown "
        "variants share with the reduced one, counts for each."
    )
    return section


def _costs(setting: Setting, summary: Mapping[str, Any]) -> Section:
    section = Section("What growth costs")
    even = summary["variants"]["even_start"]["last_epoch_seconds"]
    rows = []
    for variant in setting.variants:
        value = summary["variants"][variant.name]
        if "growth_seconds" not in value:
            continue
        parts = value["growth_seconds"]
        slower = value["last_epoch_seconds"] / even
        rows.append(
            [
                variant.name,
                Figures(str(value["growth_steps"])),
                *(Figures(f"{parts[part]:.2f}") for part in ("collect", "score", "surgery")),
                Figures(f"{value['growth_share_of_time']:.1f}"),
                Figures(f"{slower:.2f}"),
                Figures(f"{value['largest_output_change']:.1e}"),
            ]
        )
    section.table(
        ["Variant", "Growths", "Collecting, s", "Scores, s", "Selection and surgery, s",
         "% of the time", "Epoch at the end, × even_start's", "Largest change of the output"],
        rows,
    )  # fmt: skip
    section.text(
        "Seconds over all runs: passes that record inputs and gradients, scores (for splitting, "
        "S2D and the gated variants the smallest eigenpairs), selection and surgery. A grown "
        "layer computes its branches beside its base, which can make later epochs longer than "
        "those of the evenly reduced network, which has about as many parameters as the small "
        "size. The change is the largest difference of an output before and after a growth, "
        "relative to the largest output, over all growths."
    )
    return section


def _how_to(summary: Mapping[str, Any]) -> Section:
    data = "" if summary["data"]["name"].startswith("synthetic") else "--data DIR "
    return report.run_again(
        f"growkernels reproduce scaling {data}--preset {summary['preset']} --out FOLDER",
        "the same numbers",
        "Curves and every growth step",
    )
