// The module growkernels._build_info: what the op library was built for, and numbers that Python shares with its
// kernels. No tensors and no torch.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "build_info.h"
#include "eigen/constants.h"

namespace py = pybind11;

namespace {

py::tuple split(const std::string& text) {
  py::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    parts.append(part);
  }
  return py::tuple(parts);
}

py::object text_or_none(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

}  // namespace

PYBIND11_MODULE(_build_info, module) {
  module.doc() = "What the growkernels op library was built for.";
  module.attr("torch_version") = GK_TORCH_VERSION;
  module.attr("cuda_version") = text_or_none(GK_CUDA_VERSION);
  module.attr("cuda_architectures") = split(GK_CUDA_ARCHITECTURES);
  module.attr("cuda_families") = split(GK_CUDA_FAMILIES);
  module.attr("cuda_note") = GK_CUDA_NOTE;
  module.attr("compiler") = GK_COMPILER;
  module.attr("search_space_blocks") = growkernels::eigen::kSearchSpaceBlocks;
}
