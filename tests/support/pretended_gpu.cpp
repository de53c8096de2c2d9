// Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
// The device type `cuda` of a PyTorch without CUDA: its tensors are in the memory of the CPU, and every operation is
// that of the CPU. What a GPU refuses is refused: operands and generators of another device. What a GPU waits for, what
// is copied from or to it, and the dtypes of its products are reported.

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <new>
#include <string>
#include <unordered_set>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::DispatchKey;
using c10::IValue;
using c10::Stream;
using c10::StreamId;

// ---- Reports ----

using Listener = void (*)(const char* kind, const char* operation, const char* detail, int64_t numbers);
std::atomic<Listener> listener{nullptr};

void report(const char* kind, const std::string& operation, const std::string& detail, int64_t numbers) {
  if (auto listens = listener.load()) listens(kind, operation.c_str(), detail.c_str(), numbers);
}

// ---- Memory, and what a thread works on ----

std::atomic<int64_t> live{0}, peak{0};  // bytes

void count(int64_t bytes) {
  const auto now = live += bytes;
  auto before = peak.load();
  while (now > before && !peak.compare_exchange_weak(before, now)) {}
}

// Memory of the CPU, with a device and a number of bytes for as long as it is kept.
struct Kept {
  Kept(c10::Storage storage, bool counts) : storage(std::move(storage)), bytes(counts ? this->storage.nbytes() : 0) { count(bytes); }
  ~Kept() { count(-bytes); }
  static void drop(void* kept) { delete static_cast<Kept*>(kept); }
  const c10::Storage storage;
  const int64_t bytes;
};

c10::Storage shared_storage(c10::Storage storage, DeviceType type) {
  const auto bytes = storage.nbytes();
  auto* data = storage.mutable_data();
  auto* kept = new Kept(std::move(storage), type == DeviceType::CUDA);
  c10::DataPtr pointer(data, kept, &Kept::drop, type == DeviceType::CUDA ? Device(type, 0) : Device(type));
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, std::move(pointer), nullptr, false);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, c10::GetCPUAllocator()->allocate(bytes), nullptr, false);
    auto* data = storage.mutable_data();
    return {data, new Kept(std::move(storage), true), &Kept::drop, Device(DeviceType::CUDA, 0)};
  }
  void copy_data(void* target, const void* source, size_t bytes) const override { default_copy_data(target, source, bytes); }
};

Memory memory;
thread_local StreamId current_stream = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(DeviceType) {}
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::UNSAFE, getDevice(), current_stream); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::UNSAFE, getDevice(), 0); }
  Stream exchangeStream(Stream stream) const override {
    auto before = getStream(getDevice());
    current_stream = stream.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

const c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new Guard());

// What PyTorch asks to learn whether there is a GPU.
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return Device(DeviceType::CUDA, 0); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));

// ---- One memory, two tensors ----

bool on_device(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == DeviceType::CUDA; }

Tensor shaped(Tensor tensor, const Tensor& like) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_offset(like.storage_offset());
  impl->set_sizes_and_strides(like.sizes(), like.strides());
  if (like.is_conj()) tensor._set_conj(true);
  if (like.is_neg()) tensor._set_neg(true);
  return tensor;
}

Tensor with_storage(c10::Storage storage, DispatchKey key, const Tensor& like) {
  return shaped(at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype()), like);
}

// A view, which is of the inference mode if its base is, whatever the mode is now.
Tensor view_of(const Tensor& base, const Tensor& like) {
  auto storage = base.storage();
  return shaped(at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, std::move(storage), base.key_set(), like.dtype()), like);
}

Tensor on_cpu(const Tensor& tensor) {
  return with_storage(shared_storage(tensor.storage(), DeviceType::CPU), DispatchKey::CPU, tensor);
}

Tensor to_pretended(const Tensor& tensor) {
  return with_storage(shared_storage(tensor.storage(), DeviceType::CUDA), DispatchKey::CUDA, tensor);
}

// ---- What is reported of an operation ----

const std::unordered_set<std::string> products = {
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addbmm", "aten::mv", "aten::addmv", "aten::dot",
    "aten::convolution", "aten::convolution_backward", "aten::_scaled_dot_product_flash_attention_for_cpu"};
const std::unordered_set<std::string> waits = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive"};
// As on a GPU, where they copy the indices to it.
const std::unordered_set<std::string> takes_other_indices = {
    "aten::index", "aten::index_put", "aten::_index_put_impl_", "aten::index_put_", "aten::_unsafe_index"};

// ---- Any operation ----

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const auto begin = stack->size() - op.schema().arguments().size();
  std::vector<std::pair<Tensor, Tensor>> pairs;  // the device's tensor, and the CPU's of the same memory
  std::string dtypes;
  int64_t numbers = 0;
  const bool is_product = products.count(name) > 0;

  auto take = [&](const Tensor& tensor) -> Tensor {
    if (!tensor.defined()) return tensor;
    if (is_product && dtypes.find(c10::toString(tensor.scalar_type())) == std::string::npos)
      dtypes += (dtypes.empty() ? "" : " ") + std::string(c10::toString(tensor.scalar_type()));
    numbers = std::max(numbers, tensor.numel());
    if (!on_device(tensor)) {
      if (takes_other_indices.count(name)) {
        report("to_device", name, "index", tensor.numel());
        return tensor;
      }
      TORCH_CHECK(tensor.dim() == 0 && tensor.device().type() == DeviceType::CPU,
          "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ", tensor.device(),
          "! (when calling ", name, ", a tensor of shape ", tensor.sizes(), ")");
      return tensor;
    }
    pairs.emplace_back(tensor, tensor.numel() == 0 && !tensor.storage().mutable_data()
        ? at::detail::empty_cpu(tensor.sizes(), tensor.scalar_type()) : on_cpu(tensor));
    return pairs.back().second;
  };

  for (size_t place = begin; place < stack->size(); ++place) {
    auto& value = (*stack)[place];
    if (value.isTensor()) {
      value = take(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const auto& tensor : value.toTensorVector()) list.push_back(take(tensor));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector())
        list.push_back(tensor.has_value() ? std::optional<Tensor>(take(*tensor)) : std::nullopt);
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == DeviceType::CUDA) {
      value = Device(DeviceType::CPU);
    } else if (value.isGenerator()) {
      TORCH_CHECK(value.toGenerator().device().type() == DeviceType::CUDA,
          "Expected a 'cuda' device type for generator but found 'cpu' (when calling ", name, ")");
    }
  }
  if (name == "aten::_softmax" || name == "aten::_log_softmax") {  // the CPU converts by an operation of its own
    auto& half_to_float = (*stack)[begin + 2];
    if (half_to_float.isBool() && half_to_float.toBool()) {
      (*stack)[begin] = (*stack)[begin].toTensor().to(at::kFloat);
      half_to_float = false;
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
  }
  auto give = [&](const Tensor& tensor) -> Tensor {
    if (!tensor.defined()) return tensor;
    for (const auto& [mine, its] : pairs) {
      if (tensor.is_same(its)) return mine;
      if (tensor.storage().is_alias_of(its.storage())) return view_of(mine, tensor);
    }
    return to_pretended(tensor);
  };
  for (const auto& [mine, its] : pairs) {  // an `out` that was resized, or a tensor whose shape was changed in place
    if (mine.sizes() == its.sizes() && mine.strides() == its.strides()) continue;
    auto* impl = mine.unsafeGetTensorImpl();
    if (its.storage().data() != mine.storage().data())
      impl->set_storage_keep_dtype(shared_storage(its.storage(), DeviceType::CUDA));
    impl->set_sizes_and_strides(its.sizes(), its.strides());
  }
  const auto results = stack->size() - op.schema().returns().size();
  for (size_t place = results; place < stack->size(); ++place) {
    auto& value = (*stack)[place];
    if (value.isTensor()) {
      value = give(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const auto& tensor : value.toTensorVector()) list.push_back(give(tensor));
      value = list;
    }
  }
  if (is_product) report("product", name, dtypes, numbers);
  else if (waits.count(name)) report("wait", name, "", numbers);
  else report("kernel", name, "", numbers);
}

// ---- What needs more than the CPU's operation ----

Tensor make_empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

Tensor make_empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor& copy(Tensor& self, const Tensor& source, bool non_blocking) {
  if (!on_device(source)) report("to_device", "aten::copy_", non_blocking ? "non_blocking" : "", source.numel());
  else if (!on_device(self)) report(non_blocking ? "from_device" : "wait", "aten::copy_", "", source.numel());
  else report("kernel", "aten::copy_", "", source.numel());
  at::AutoDispatchBelowADInplaceOrView below;
  auto target = on_device(self) ? on_cpu(self) : self;
  target.copy_(on_device(source) ? on_cpu(source) : source);
  return self;
}

int64_t choose_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 2;  // the memory-efficient one, which takes masks
}

void check_devices(std::initializer_list<Tensor> tensors) {
  for (const auto& tensor : tensors)
    TORCH_CHECK(!tensor.defined() || on_device(tensor), "Expected all tensors to be on the same device, but found at least "
        "two devices, cuda:0 and ", tensor.device(), "! (attention)");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& mask, bool, double dropout, bool causal, std::optional<double> scale) {
  auto bias = mask.value_or(Tensor());
  check_devices({query, key, value, bias});
  report("product", "attention", c10::toString(query.scalar_type()), query.numel());
  at::AutoDispatchBelowADInplaceOrView below;
  auto [output, sums] = at::_scaled_dot_product_flash_attention_for_cpu(on_cpu(query), on_cpu(key), on_cpu(value),
      dropout, causal, bias.defined() ? std::optional<Tensor>(on_cpu(bias).to(query.dtype())) : std::nullopt, scale);
  auto nothing = make_empty({}, at::kLong, {}, {}, {}, {});
  return {to_pretended(output), to_pretended(sums), nothing, nothing};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& bias, const Tensor& output, const Tensor& sums, const Tensor&, const Tensor&,
    double dropout, std::array<bool, 4>, bool causal, std::optional<double> scale) {
  check_devices({grad, query, key, value, bias});
  report("product", "attention_backward", c10::toString(query.scalar_type()), query.numel());
  at::AutoDispatchBelowADInplaceOrView below;
  auto [q, k, v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(on_cpu(grad), on_cpu(query), on_cpu(key),
      on_cpu(value), on_cpu(output), on_cpu(sums), dropout, causal,
      bias.defined() ? std::optional<Tensor>(on_cpu(bias).to(query.dtype())) : std::nullopt, scale);
  return {to_pretended(q), to_pretended(k), to_pretended(v), Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", make_empty);
  library.impl("empty_strided", make_empty_strided);
  library.impl("copy_", copy);
  library.impl("_scaled_dot_product_efficient_attention", attention);
  library.impl("_scaled_dot_product_efficient_attention_backward", attention_backward);
  // Elsewhere they choose a library of the GPU.
  library.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  library.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

extern "C" {

__attribute__((constructor)) void start() {
  c10::SetAllocator(DeviceType::CUDA, &memory);
  // PyTorch has made its hooks, and keeps them: in their place, for it has no other way to exchange them.
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(choose_attention);
}

void pretended_listen(Listener listens) { listener = listens; }
void pretended_set_stream(int64_t stream) { current_stream = stream; }
int64_t pretended_stream() { return current_stream; }
int64_t pretended_live_bytes() { return live; }
int64_t pretended_peak_bytes() { return peak; }
void pretended_reset_peak() { peak = live.load(); }

}
