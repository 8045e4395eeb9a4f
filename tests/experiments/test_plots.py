import pytest

from growkernels.experiments import plots as style


def test_panels_leave_room_for_what_is_written_beside_them():
    boxes = {}
    for label in ("", "an axis that is called\nin three\nlines"):
        figure, axes = style.panels(2, columns=2)
        axes[1].set_ylabel(label)
        figure.draw_without_rendering()
        boxes[label] = axes[0].get_position()
    one, other = boxes.values()
    assert other.x1 < one.x1 - 0.03


def test_labels_of_close_curves_move_to_both_sides():
    figure, (axes,) = style.panels(1, columns=1)
    axes.plot([0, 1], [0, 1])
    figure.draw_without_rendering()
    style.label_ends(axes, [(1.0, "one", "k"), (0.2, "apart", "k"), (1.0, "other", "k")], x=1.0)
    shifts = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert shifts["apart"] == pytest.approx(0)
    assert shifts["one"] == pytest.approx(-5.25)
    assert shifts["other"] == pytest.approx(5.25)


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([], []),
        ([0, 10, 20], [0, 10, 20]),
        ([0, 4, 30], [-3, 7, 30]),
        ([0, 0, 0], [-10, 0, 10]),
        ([0, 12, 13, 13], [-5.5, 4.5, 14.5, 24.5]),
    ],
)
def test_places_are_the_nearest_that_keep_the_gap(wanted, placed):
    assert style.moved_apart(wanted, 10) == pytest.approx(placed)
