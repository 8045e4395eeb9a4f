"""Beyond Uniform Scaling: add neurons next to those at a saddle (arXiv 2402.12418)."""

from growkernels.growth.neuron_scaling.costs import forward_flops
from growkernels.growth.neuron_scaling.criteria import Scores
from growkernels.growth.neuron_scaling.driver import NeuronScaling
from growkernels.growth.neuron_scaling.selection import Selection
from growkernels.growth.neuron_scaling.sharing import share_budget

__all__ = ["NeuronScaling", "Scores", "Selection", "forward_flops", "share_budget"]
