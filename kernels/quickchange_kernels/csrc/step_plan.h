// A step recorded once and run again without Python: the operators that PyTorch's dispatcher called,
// with their arguments, and the memory that each allocated. It is to the CPU what a CUDA graph is to a
// GPU, under the same terms: what the operators read lies in memory that stays, no value is read on the
// host, and the results lie where they lay when the step was recorded.
//
// Nothing is recognised by name. An operator is recorded as the dispatcher's outermost call of it and
// run through the same dispatcher, so that the same kernels write the same bits. Its memory comes from
// a pool while it is recorded; when it runs again it is given the very same pieces in the same order.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <ATen/record_function.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/InferenceMode.h>
#include <torch/custom_class.h>

#include <sys/mman.h>

#include <map>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "binding.h"

namespace quickchange {
namespace {

// Memory of recorded steps, of which one runs at a time: what a step has let go of while it was
// recorded is taken by its later operators and by other steps. Always the lowest place that is free, so
// that operators write where others have just been read, in the cache.
class StepMemory : public torch::CustomClassHolder {
 public:
  ~StepMemory() override {
    std::lock_guard<std::mutex> held(lock());
    for (const auto& [begin, size] : regions_) munmap(begin, size);
  }

  void* take(size_t size) {
    std::lock_guard<std::mutex> held(lock());
    size = (size + LINE - 1) / LINE * LINE;
    auto found = free_.begin();
    while (found != free_.end() && found->second < size) ++found;
    if (found == free_.end()) found = free_.insert(reserve(std::max(size, REGION))).first;
    const auto [begin, room] = *found;
    free_.erase(found);
    if (room > size) free_.emplace(begin + size, room - size);
    taken_ += size;
    most_ = std::max(most_, taken_);
    blocks().emplace(begin, Block{size, self()});
    return begin;
  }

  static void give_back(void* data) {
    std::unique_lock<std::mutex> held(lock());
    const auto found = blocks().find(data);
    const auto [size, memory] = std::move(found->second);
    blocks().erase(found);
    memory->free_block(static_cast<char*>(data), size);
    held.unlock();  // before the memory itself may end
  }

  // True if `data` is a block of any of these memories.
  static bool holds(void* data) {
    std::lock_guard<std::mutex> held(lock());
    return blocks().contains(data);
  }

  // The most bytes that were taken at once.
  int64_t bytes() const { return most_; }

 private:
  using Ranges = std::map<char*, size_t>;
  struct Block {
    size_t size;
    c10::intrusive_ptr<StepMemory> memory;
  };
  static constexpr size_t LINE = 64;
  static constexpr size_t REGION = size_t(256) << 20;  // addresses; pages that are used take memory

  std::pair<char*, size_t> reserve(size_t size) {
    void* const begin = mmap(
        nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(begin != MAP_FAILED, "no memory for a recorded step's ", size, " bytes");
    return *regions_.emplace(static_cast<char*>(begin), size).first;
  }

  void free_block(char* begin, size_t size) {
    taken_ -= size;
    auto next = free_.emplace(begin, size).first;
    if (next != free_.begin()) join(std::prev(next), next);
    next = free_.upper_bound(begin);
    if (next != free_.end()) join(std::prev(next), next);
  }

  void join(Ranges::iterator first, Ranges::iterator second) {
    if (first->first + first->second != second->first) return;
    first->second += second->second;
    free_.erase(second);
  }

  c10::intrusive_ptr<StepMemory> self() {
    return c10::intrusive_ptr<StepMemory>::unsafe_reclaim_from_nonowning(this);
  }

  static std::mutex& lock() {
    static auto* const lock = new std::mutex;  // for ever, as the blocks
    return *lock;
  }

  // What is taken of all memories. For ever: tensors may outlive what is static. Not beside the data,
  // where a step that runs again writes what it wrote before.
  static std::unordered_map<void*, Block>& blocks() {
    static auto* const all = new std::unordered_map<void*, Block>;
    return *all;
  }

  Ranges free_, regions_;
  size_t taken_ = 0, most_ = 0;
};

struct Piece {
  void* data;
  size_t size;
};

// What the calling thread's allocations are taken from: memory that is noted, or pieces noted before.
struct Allocations {
  StepMemory* from = nullptr;
  std::vector<Piece>* noted = nullptr;
  const std::vector<Piece>* given = nullptr;
  size_t next = 0;
};

thread_local Allocations allocations;

// PyTorch's own allocator, but for operators that are recorded or run again.
class StepAllocator : public at::Allocator {
 public:
  at::DataPtr allocate(size_t size) override {
    Allocations& now = allocations;
    if (size && now.given && now.next < now.given->size()) {
      const Piece& piece = (*now.given)[now.next++];
      if (piece.size == size) return {piece.data, piece.data, &c10::NoDelete, at::DeviceType::CPU};
    }
    if (!size || !now.from) return own_->allocate(size);
    void* const data = now.from->take(size);
    now.noted->push_back({data, size});
    return {data, data, &StepMemory::give_back, at::DeviceType::CPU};
  }

  at::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    own_->copy_data(to, from, size);
  }

  static void install() {
    static StepAllocator* const installed = [] {
      auto* made = new StepAllocator;  // for ever: tensors keep its deleters
      made->own_ = c10::GetDefaultCPUAllocator();
      at::SetAllocator(at::DeviceType::CPU, made);
      return made;
    }();
    (void)installed;
  }

 private:
  static void release(void* data) {
    if (!data || given(data)) return;
    if (StepMemory::holds(data)) return StepMemory::give_back(data);
    c10::GetDefaultCPUAllocator()->raw_deallocate(data);
  }

  // True for a piece that an operator which runs again has been given.
  static bool given(void* data) {
    const auto* pieces = allocations.given;
    return pieces && std::any_of(pieces->begin(), pieces->end(), [&](const Piece& piece) {
             return piece.data == data;
           });
  }

  at::Allocator* own_ = nullptr;
};

using Values = std::vector<c10::IValue>;

// Calls change(tensor) for each tensor of a value, in lists too, and puts the result in its place.
template <class Change>
c10::IValue with_tensors(const c10::IValue& value, const Change& change) {
  if (value.isTensor()) return value.toTensor().defined() ? c10::IValue(change(value.toTensor())) : value;
  if (!value.isList()) return value;
  const auto list = value.toList();
  auto changed = c10::impl::GenericList(list.elementType());
  for (const c10::IValue& each : list) changed.push_back(with_tensors(each, change));
  return changed;
}

std::vector<Tensor> tensors_of(at::ArrayRef<c10::IValue> values) {
  std::vector<Tensor> found;
  for (const auto& value : values)
    with_tensors(value, [&](const Tensor& tensor) { return found.push_back(tensor), tensor; });
  return found;
}

class StepPlan : public torch::CustomClassHolder {
 public:
  explicit StepPlan(c10::intrusive_ptr<StepMemory> memory) : memory_(std::move(memory)) {
    StepAllocator::install();
  }

  // Records the calling thread's operators until `end`.
  void begin() {
    TORCH_CHECK(!recording, "a step is being recorded already");
    recording = this;
    depth_ = 0;
    callback_ = at::addThreadLocalCallback(at::RecordFunctionCallback(entered, left)
                                               .needsInputs(true)
                                               .needsOutputs(true)
                                               .scopes({at::RecordScope::FUNCTION}));
  }

  // Returns why the step can't be run again; empty if it can.
  std::string end() {
    TORCH_CHECK(recording == this, "this step is not being recorded");
    at::removeCallback(callback_);
    recording = nullptr;
    allocations = {};
    if (calls_.empty() && refusal_.empty()) refusal_ = "PyTorch told of no operators";
    return refusal_;
  }

  void run() {
    const c10::InferenceMode inference;
    const OneTeam team;
    Values stack;
    for (const Call& call : calls_) {
      team.wide(call.wide);
      repeat(call, stack);
    }
  }

  // Pieces that somebody else than these outputs still holds: other steps write there.
  int64_t held(const std::vector<Tensor>& outputs) const {
    return std::count_if(pooled_.begin(), pooled_.end(), [&](void* data) {
      return StepMemory::holds(data) &&
             std::none_of(outputs.begin(), outputs.end(), [&](const Tensor& output) {
               return output.storage().data() == data;
             });
    });
  }

  int64_t length() const { return calls_.size(); }

 private:
  struct Call {
    c10::OperatorHandle op;
    Values inputs;
    std::vector<Piece> pieces;
    std::vector<std::pair<size_t, Tensor>> made;  // outputs in memory of its own, by their place
    bool wide;  // it may use PyTorch's threads
  };
  static constexpr int64_t WIDE = int64_t(1) << 20;  // elements: a product, and no copy of some rows

  // Of the thread that an operator runs on.
  struct Giving {
    explicit Giving(const std::vector<Piece>& pieces) { allocations.given = &pieces; }
    ~Giving() { allocations = {}; }
  };

  static void repeat(const Call& call, Values& stack) {
    stack.assign(call.inputs.begin(), call.inputs.end());
    const Giving giving(call.pieces);
    call.op.callBoxed(&stack);
    if (call.made.empty()) return;
    const std::vector<Tensor> results = tensors_of(stack);
    for (const auto& [place, recorded] : call.made) {
      const Tensor& result = results[place];
      if (result.const_data_ptr() == recorded.const_data_ptr()) continue;
      TORCH_CHECK(
          result.sizes() == recorded.sizes(), "a recorded step: ", call.op.operator_name(), " made ",
          result.sizes(), " and not ", recorded.sizes(), " as before");
      recorded.copy_(result);
    }
  }

  // Without a hold on memory of the pool, which others take as soon as nobody else holds it.
  Tensor kept(const Tensor& tensor) const {
    if (!tensor.has_storage() || !pooled_.contains(tensor.storage().mutable_data())) return tensor;
    return at::from_blob(
        tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(), tensor.options());
  }

  static std::unique_ptr<at::ObserverContext> entered(const at::RecordFunction& function) {
    if (recording) recording->enter(function);
    return nullptr;
  }

  static void left(const at::RecordFunction& function, at::ObserverContext*) {
    if (recording) recording->leave(function);
  }

  static bool reads_values(const c10::OperatorHandle& op) {
    if (op.operator_name().name == "aten::index") return false;  // a mask's indices come from nonzero
    return op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape);
  }

  void enter(const at::RecordFunction& function) {
    const auto name = function.operator_name();
    if (!name) return;
    const auto op = c10::Dispatcher::singleton().findSchema(*name);
    if (op && reads_values(*op) && refusal_.empty())
      refusal_ = c10::str(*name, " reads values on the host");
    if (depth_++ || !op) return;
    // Ours use them where they have no native version.
    call_.emplace(Call{*op, {}, {}, {}, name->getNamespace() == "quickchange"});
    for (const auto& input : function.inputs())
      call_->inputs.push_back(with_tensors(input, [&](const Tensor& tensor) {
        call_->wide |= tensor.numel() >= WIDE;
        return kept(tensor);
      }));
    // What `empty` gives is filled by whoever called it, perhaps without an operator: not ours to share.
    if (name->name.find("::empty") == std::string::npos &&
        name->name.find("::new_empty") == std::string::npos) {
      allocations.from = memory_.get();
      allocations.noted = &call_->pieces;
    }
  }

  void leave(const at::RecordFunction& function) {
    if (!function.operator_name() || --depth_ || !call_) return;
    allocations = {};
    for (const Piece& piece : call_->pieces) pooled_.insert(piece.data);
    const std::vector<Tensor> results = tensors_of(function.outputs());
    for (size_t place = 0; place < results.size(); place++) {
      const Tensor& result = results[place];
      const bool made = std::any_of(
          call_->pieces.begin(), call_->pieces.end(),
          [&](const Piece& piece) { return piece.data == result.storage().data(); });
      if (made) call_->made.emplace_back(place, kept(result));
    }
    if (!call_->made.empty() || call_->op.schema().is_mutable()) calls_.push_back(std::move(*call_));
    call_.reset();
  }

  static thread_local StepPlan* recording;

  c10::intrusive_ptr<StepMemory> memory_;
  std::vector<Call> calls_;
  std::unordered_set<void*> pooled_;
  std::optional<Call> call_;
  std::string refusal_;
  int64_t depth_ = 0;
  at::CallbackHandle callback_ = 0;
};

thread_local StepPlan* StepPlan::recording = nullptr;

}  // namespace
}  // namespace quickchange
