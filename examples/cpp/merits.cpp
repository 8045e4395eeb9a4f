// Merits of layers that do not exist yet, in C++: the op is found by name, as torch's own are.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cmath>
#include <iostream>
#include <vector>

namespace {

// The squared norm of dL/dW of relu(W h), W = I, behind each h, from dL/dh alone.
at::Tensor merits(const std::vector<at::Tensor>& h, const std::vector<at::Tensor>& grads) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("growkernels::virtual_grad_norms", "")
          .typed<at::Tensor(at::TensorList, at::TensorList, std::string_view, std::string_view, double)>();
  return op.call(h, grads, "linear_relu", "relu", 1.0);
}

}  // namespace

int main() {
  at::manual_seed(0);
  const at::Tensor x = at::randn({64, 8}), labels = at::randint(3, {64}, at::kLong);
  const at::Tensor first = at::randn({8, 16}).requires_grad_(), second = at::randn({16, 16}).requires_grad_(),
                   head = at::randn({16, 3}).requires_grad_();

  const at::Tensor h1 = at::relu(at::mm(x, first)), h2 = at::relu(at::mm(h1, second));
  h1.retain_grad();
  h2.retain_grad();
  at::cross_entropy_loss(at::mm(h2, head), labels).backward();

  const std::vector<at::Tensor> h = {h1.detach(), h2.detach()}, grads = {h1.grad(), h2.grad()};
  const at::Tensor found = merits(h, grads);
  std::cout << "merits: " << found[0].item<float>() << " and " << found[1].item<float>() << "\n";

  // The same by hand.
  double difference = 0;
  for (size_t i = 0; i < h.size(); ++i) {
    const at::Tensor masked = grads[i] * (h[i] > 0);
    const double by_hand = at::mm(masked.t(), h[i]).square().sum().item<double>();
    difference = std::max(difference, std::abs(by_hand - found[i].item<double>()) / by_hand);
  }
  std::cout << "differ from products of matrices by " << difference << "\n";
  return difference < 1e-4 ? 0 : 1;
}
