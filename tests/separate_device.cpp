// Devices of type "separate", in locked pages of the host's memory: what reads a tensor of theirs
// without copying it to the CPU first crashes, and operations on tensors of two devices raise
// errors, as on GPUs. Operations copy their operands to the CPU, and their results back. The last
// device has no double precision, as Apple's GPUs have none.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <cstring>
#include <mutex>

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using std::optional;

constexpr auto SEPARATE = c10::DeviceType::PrivateUse1;
constexpr auto KEYS = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
constexpr DeviceIndex DEVICES = 3, SINGLE = 2;
thread_local DeviceIndex current = 0;

bool separate(const Tensor& t) { return t.device().type() == SEPARATE; }

// --- memory

struct Pages {
  void* data;
  size_t bytes;
  int readers = 0;
};
std::mutex locks;

void unmap(void* context) {
  auto pages = static_cast<Pages*>(context);
  munmap(pages->data, pages->bytes);
  delete pages;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    bytes = std::max<size_t>(bytes, 1);
    void* data = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(data != MAP_FAILED, "no memory for ", bytes, " bytes");
    return {data, new Pages{data, bytes}, &unmap, Device(SEPARATE, current)};
  }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "locked"); }
} allocator;

REGISTER_ALLOCATOR(SEPARATE, &allocator)

struct Unlocked {  // one storage, for as long as this lives
  Pages* pages;
  explicit Unlocked(const c10::Storage& storage)
      : pages(static_cast<Pages*>(storage.data_ptr().get_context())) {
    turn(1, PROT_READ | PROT_WRITE);
  }
  ~Unlocked() { turn(-1, PROT_NONE); }
  void turn(int reader, int access) {
    std::lock_guard<std::mutex> lock(locks);
    pages->readers += reader;
    if (pages->readers == (reader > 0)) mprotect(pages->data, pages->bytes, access);
  }
};

Tensor seen_by_the_host(const Tensor& t) {
  auto data = c10::DataPtr(t.storage().mutable_data(), Device(c10::DeviceType::CPU));
  auto bytes = c10::Storage::use_byte_size_t();
  auto storage = c10::Storage(bytes, t.storage().nbytes(), std::move(data), nullptr, false);
  auto keys = c10::DispatchKeySet(c10::DispatchKey::CPU);
  auto seen = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, t.dtype());
  seen.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  seen._set_conj(t.is_conj());
  seen._set_neg(t.is_neg());
  return seen;
}

Tensor copy_from(const Tensor& self, const Tensor& target, bool) {
  at::NoGradGuard no_grad;
  optional<Unlocked> read, written;
  if (separate(self)) read.emplace(self.storage());
  if (separate(target)) written.emplace(target.storage());
  auto values = separate(self) ? seen_by_the_host(self) : self;
  (separate(target) ? seen_by_the_host(target) : target).copy_(values);
  return target;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
  target.resize_(self.sizes());
  return copy_from(self, target, false);
}

void choose(optional<Device> device) {
  if (device && device->has_index()) current = device->index();
}

at::ScalarType supported(optional<at::ScalarType> asked) {
  auto type = asked.value_or(c10::get_default_dtype_as_scalartype());
  TORCH_CHECK_TYPE(current != SINGLE || type != at::kDouble, "no double precision on this device");
  return type;
}

Tensor empty(IntArrayRef size, optional<at::ScalarType> type, optional<at::Layout>,
             optional<Device> device, optional<bool>, optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(Device(SEPARATE, current)));
  return at::detail::empty_generic(size, &allocator, KEYS, supported(type), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> type,
                     optional<at::Layout>, optional<Device> device, optional<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(SEPARATE, current)));
  return at::detail::empty_strided_generic(size, stride, &allocator, KEYS, supported(type));
}

const Tensor& resize(const Tensor& self, IntArrayRef size, optional<at::MemoryFormat>) {
  if (self.sizes() == size) return self;
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  size_t bytes = (self.storage_offset() + self.numel()) * self.dtype().itemsize();
  auto storage = self.storage();
  if (bytes <= storage.nbytes()) return self;
  c10::DeviceGuard guard(self.device());
  c10::Storage grown(c10::Storage::use_byte_size_t(), bytes, allocator.allocate(bytes), &allocator,
                     true);
  {
    Unlocked from(storage), to(grown);
    std::memcpy(grown.mutable_data(), storage.data(), storage.nbytes());
  }
  storage.set_data_ptr_noswap(std::move(grown.mutable_data_ptr()));
  storage.set_nbytes(bytes);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, IntArrayRef size,
                    IntArrayRef stride) {
  auto impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (stride.size() == size.size())
    impl->set_sizes_and_strides(size, stride);
  else
    impl->set_sizes_contiguous(size);
  return self;
}

// --- random numbers

struct Generator final : at::CPUGeneratorImpl {
  at::Generator host = at::detail::createCPUGenerator();
  explicit Generator(DeviceIndex index) {
    device_ = Device(SEPARATE, index);
    key_set_ = KEYS;
  }
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& s) override { host.unsafeGetGeneratorImpl()->set_state(s); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
};

const at::Generator& global_generator(DeviceIndex index) {
  static std::vector<at::Generator> all;
  while (all.size() < DEVICES) all.push_back(at::make_generator<Generator>(all.size()));
  return all.at(index < 0 ? current : index);
}

// --- the device

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  DeviceIndex getCurrentDevice() const override { return current; }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    return global_generator(index);
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current : index);
  }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return SEPARATE; }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  Device getDevice() const override { return {SEPARATE, current}; }
  void setDevice(Device device) const override { choose(device); }
  void uncheckedSetDevice(Device device) const noexcept override { choose(device); }
  Device exchangeDevice(Device device) const override {
    auto before = getDevice();
    choose(device);
    return before;
  }
  c10::Stream getStream(Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  void record(void**, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeDevice(DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// --- operations

void on_the_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto name = op.schema().operator_name().name;
  bool indexes = name.find("index") != std::string::npos;  // indices may lie on the CPU
  optional<Device> device;
  auto look = [&](const Tensor& t) {
    if (!t.defined() || (t.device().is_cpu() && (t.dim() == 0 || indexes))) return;
    TORCH_CHECK(device.value_or(t.device()) == t.device(), name, " of tensors on two devices");
    device = t.device();
  };
  auto count = op.schema().arguments().size();
  for (auto& value : torch::jit::last(*stack, count)) {
    if (value.isTensor()) look(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& t : value.toTensorVector()) look(t);
  }
  for (size_t i = stack->size() - count; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    auto index = i - (stack->size() - count);
    if (op.schema().arguments()[index].name() != "generator" || !device) continue;
    auto generator = value.isNone() ? global_generator(device->index()) : value.toGenerator();
    TORCH_CHECK(generator.device() == device, name, " by a generator of another device");
    value = static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->host;
  }
  at::native::cpu_fallback(op, stack);
}

at::Scalar to_number(const Tensor& self) { return self.cpu().item(); }

Tensor convolution(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed,
                   IntArrayRef output_padding, int64_t groups) {
  auto added = bias && bias->defined() ? optional<Tensor>(bias->cpu()) : std::nullopt;
  return at::convolution(x.cpu(), weight.cpu(), added, stride, padding, dilation, transposed,
                         output_padding, groups)
      .to(x.device());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& x,
                                                        const Tensor& weight, IntArrayRef stride,
                                                        IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef output_padding,
                                                        int64_t groups,
                                                        std::array<bool, 3> wanted) {
  std::vector<int64_t> bias{gradient.size(1)};
  auto [dx, dw, db] =
      at::convolution_backward(gradient.cpu(), x.cpu(), weight.cpu(), IntArrayRef(bias), stride,
                               padding, dilation, transposed, output_padding, groups, wanted);
  auto back = [&](const Tensor& t) { return t.defined() ? t.to(x.device()) : t; };
  return {back(dx), back(dw), back(db)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", to_number);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

TORCH_LIBRARY(separate, m) {
  m.def("seed", [](int64_t seed) {
    for (DeviceIndex i = 0; i < DEVICES; i++)
      at::Generator(global_generator(i)).set_current_seed(seed);
  });
  m.def("random_state", [](int64_t index) { return global_generator(index).get_state(); });
  m.def("set_random_state", [](const Tensor& state, int64_t index) {
    at::Generator(global_generator(index)).set_state(state);
  });
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}

}  // namespace
