// Tensors as the operators see them: through torch's stable ABI alone (torch/csrc/stable, torch/headeronly), so that a
// library runs under every torch from TORCH_TARGET_VERSION (setup.py) on. Nothing of at:: or c10:: may be used here.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "scalar_types.h"

namespace lit_did {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;
using OptionalTensorList = std::vector<std::optional<Tensor>>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Keeps an operator within its tensors' memory. The Python functions check first and explain what is wrong with which
// value (lit_did/ops/checks.py).
inline void need(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("torch.ops.lit_did needs ") + what + ".");
}

// Whether `op` raises no exception. If it raises one, `message` is what it says.
using Boxed = void(StableIValue*, uint64_t, uint64_t);
template <size_t size>
[[gnu::noinline]] bool succeeds(Boxed* op, StableIValue* stack, uint64_t inputs, uint64_t outputs,
                                char (&message)[size]) noexcept {
  try {
    op(stack, inputs, outputs);
    return true;
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
  } catch (...) {
    std::snprintf(message, size, "an exception without a message");
  }
  return false;
}

// `op`, a TORCH_BOX(...), whose exceptions become torch's own: RuntimeError in Python. torch and this library may come
// with different C++ runtimes, so none of ours may leave it. torch throws through this function, which therefore has
// nothing to destroy or to catch.
template <Boxed* op>
void boxed(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  char message[1024];
  if (!succeeds(op, stack, inputs, outputs, message)) aoti_torch_check(false, "lit_did", "", 0, message);
}

inline std::vector<int64_t> contiguous_strides(Sizes sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return strides;
}

// Memory that is not set. torch::stable::empty goes through the dispatcher, which takes longer.
inline Tensor empty(Sizes sizes, ScalarType dtype, const Tensor& on_device_of) {
  const auto strides = contiguous_strides(sizes);
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(on_device_of.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(on_device_of.get(), &device_index));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  code, device_type, device_index, &handle));
  return Tensor(handle);
}

// The first entries of contiguous `memory`, as a tensor of its own shape.
inline Tensor front_of(const Tensor& memory, Sizes sizes) {
  const auto strides = contiguous_strides(sizes);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                                        strides.data(), 0, &handle));
  return Tensor(handle);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Before the address of logits that are written is read: copies what they still share with a lazy clone.
inline void own_memory(const Tensor& logits) { logits.mutable_data_ptr(); }

inline bool same_device(const Tensor& a, const Tensor& b) { return a.device() == b.device(); }

// The dtype of checked logits, for the kernels.
inline ScalarKind kind_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return ScalarKind::kFloat;
    case ScalarType::BFloat16:
      return ScalarKind::kBFloat16;
    case ScalarType::Half:
      return ScalarKind::kFloat16;
    default:
      return ScalarKind::kDouble;
  }
}

}  // namespace lit_did
