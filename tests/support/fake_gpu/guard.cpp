// Lets a torch that was built without CUDA hold tensors of device cuda that have a shape and no memory.
//
// torch asks a device guard before it indexes or copies such a tensor, and CUDA's hooks before it differentiates one or
// pins memory for it; a CPU build has neither. Here the guard remembers a number, and pinned memory is plain memory
// whose address is remembered.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <map>
#include <mutex>

namespace pretended {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

constexpr auto CUDA = c10::DeviceType::CUDA;
constexpr DeviceIndex DEVICES = 8;

DeviceIndex& current() {
  thread_local DeviceIndex index = 0;
  return index;
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  Device exchangeDevice(Device next) const override {
    const Device before = getDevice();
    current() = next.index();
    return before;
  }
  Device getDevice() const override { return Device(CUDA, current()); }
  void setDevice(Device next) const override { current() = next.index(); }
  void uncheckedSetDevice(Device next) const noexcept override { current() = next.index(); }
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int = 0) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

class Pinned final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr plain = c10::GetCPUAllocator()->allocate(bytes);
    void* start = plain.get();
    {
      const std::lock_guard<std::mutex> lock(mutex());
      ends()[start] = static_cast<char*>(start) + bytes;
    }
    return c10::DataPtr(start, new Block{std::move(plain)}, &release, Device(c10::DeviceType::CPU));
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  static bool holds(const void* pointer) {
    const std::lock_guard<std::mutex> lock(mutex());
    auto after = ends().upper_bound(const_cast<void*>(pointer));
    return after != ends().begin() && pointer < std::prev(after)->second;
  }

 private:
  struct Block {
    c10::DataPtr memory;
  };
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    {
      const std::lock_guard<std::mutex> lock(mutex());
      ends().erase(block->memory.get());
    }
    delete block;
  }
  static std::map<void*, void*>& ends() {
    static auto* found = new std::map<void*, void*>;
    return *found;
  }
  static std::mutex& mutex() {
    static auto* found = new std::mutex;
    return *found;
  }
};

}  // namespace pretended

C10_REGISTER_GUARD_IMPL(CUDA, pretended::Guard);

namespace at {

struct CUDAHooks : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return pretended::DEVICES; }
  int getNumGPUs() const override { return pretended::DEVICES; }
  DeviceIndex current_device() const override { return pretended::current(); }
  DeviceIndex getCurrentDevice() const override { return pretended::current(); }
  bool isPinnedPtr(const void* data) const override { return pretended::Pinned::holds(data); }
  Allocator* getPinnedMemoryAllocator() const override {
    static auto* allocator = new pretended::Pinned;
    return allocator;
  }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at
