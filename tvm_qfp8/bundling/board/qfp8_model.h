// Loads a bundle and runs its network. Header only, C++17; links with libtvm_ffi and libtvm_runtime.
//
//   qfp8::Model model("folder of the bundle");          // checks manifest and hashes
//   std::vector<std::vector<char>> outputs = model.Run({image_bytes});
//
// Tensors are raw bytes, row-major, with the dtypes and shapes of model.inputs and model.outputs. A network compiled for
// several lengths has a program for each, model.programs, the longest last; inputs and outputs are those of the longest,
// and Run takes the program whose inputs have the given sizes (model.Fitting). Everything that is
// wrong (a changed file, a wrong size, a failing kernel) is a std::runtime_error that says so.
#pragma once
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <sys/auxv.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "sha256.h"

namespace qfp8 {

#if defined(__aarch64__)
constexpr const char* kMachine = "aarch64";
#elif defined(__x86_64__)
constexpr const char* kMachine = "x86_64";
#elif defined(__arm__)
constexpr const char* kMachine = "armv7l";
#elif defined(__riscv)
constexpr const char* kMachine = "riscv64";
#else
#error "bundles are made for aarch64, x86_64, armv7l and riscv64"
#endif

struct TensorInfo {
  std::string name, dtype;
  std::vector<int64_t> shape;

  size_t Bytes() const {
    DLDataType type = tvm::ffi::StringToDLDataType(dtype);
    size_t count = 1;
    for (int64_t extent : shape) count *= static_cast<size_t>(extent);
    return count * ((type.bits * type.lanes + 7) / 8);
  }
};

// A function of the module: one for each length that the network is compiled for.
struct Program {
  std::string function;
  std::vector<TensorInfo> inputs, outputs;
};

// Whether the CPU has a feature: a word of /proc/cpuinfo or, where the line goes on, entry and bit of the auxiliary vector.
inline bool HasFeature(const std::string& name, std::istringstream& place) {
  unsigned long entry = 0, bit = 0;
  if (place >> entry >> bit) return getauxval(entry) >> bit & 1;
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("flags", 0) == 0) return (line + " ").find(" " + name + " ") != std::string::npos;
  }
  return true;
}

class Model {
 public:
  std::vector<Program> programs;
  std::vector<TensorInfo> inputs, outputs;

  explicit Model(const std::string& folder) {
    ReadManifest(folder);
    inputs = programs.back().inputs;
    outputs = programs.back().outputs;
    namespace ffi = tvm::ffi;
    ffi::Module library = ffi::Module::LoadFromFile(folder + "/model.so");
    ffi::Module machine = (*library->GetFunction("vm_load_executable"))().cast<ffi::Module>();
    constexpr int kPooledAllocator = 2;
    (*machine->GetFunction("vm_initialization"))(static_cast<int>(kDLCPU), 0, kPooledAllocator);
    // Fills what kernels keep in memory; without it the first call does.
    if (auto load = machine->GetFunction("qfp8_load")) (*load)();
    machine_ = machine;
    library_ = library;
  }

  // The program whose inputs have the sizes of `values`.
  const Program& Fitting(const std::vector<std::vector<char>>& values) const {
    if (values.size() != inputs.size()) {
      throw std::runtime_error(std::to_string(values.size()) + " inputs given, the network has " +
                               std::to_string(inputs.size()));
    }
    auto fits = [&](const Program& program) {
      for (size_t i = 0; i < values.size(); ++i) {
        if (values[i].size() != program.inputs[i].Bytes()) return false;
      }
      return true;
    };
    for (const Program& program : programs) {
      if (fits(program)) return program;
    }
    std::string text = "no program of the network takes inputs of these sizes:";
    for (size_t i = 0; i < values.size(); ++i) {
      text += " input " + inputs[i].name + " has " + std::to_string(values[i].size()) + " bytes, the network takes";
      for (const Program& program : programs) text += " " + std::to_string(program.inputs[i].Bytes());
    }
    throw std::runtime_error(text);
  }

  std::vector<std::vector<char>> Run(const std::vector<std::vector<char>>& values) {
    namespace ffi = tvm::ffi;
    const Program& program = Fitting(values);
    std::vector<ffi::Tensor> tensors;
    for (size_t i = 0; i < values.size(); ++i) {
      const TensorInfo& info = program.inputs[i];
      tensors.push_back(ffi::Tensor::FromNDAlloc(AlignedAllocator(), ffi::Shape(info.shape.begin(), info.shape.end()),
                                                 ffi::StringToDLDataType(info.dtype), DLDevice{kDLCPU, 0}));
      std::memcpy(tensors.back().data_ptr(), values[i].data(), values[i].size());
    }
    std::vector<ffi::AnyView> arguments(tensors.begin(), tensors.end());
    ffi::Any result;
    (*(*machine_)->GetFunction(program.function)).CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);
    std::vector<std::vector<char>> found;
    if (auto tensor = result.as<ffi::Tensor>()) {
      found.push_back(BytesOf(*tensor));
    } else {
      for (const ffi::Tensor& item : result.cast<ffi::Array<ffi::Tensor>>()) found.push_back(BytesOf(item));
    }
    return found;
  }

 private:
  // Kernels may load whole vectors from aligned addresses.
  struct AlignedAllocator {
    void AllocData(DLTensor* tensor) {
      size_t bytes = tvm::ffi::GetDataSize(*tensor);
      tensor->data = std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
    }
    void FreeData(DLTensor* tensor) { std::free(tensor->data); }
  };

  static std::vector<char> BytesOf(const tvm::ffi::Tensor& tensor) {
    const char* data = static_cast<const char*>(tensor.data_ptr());
    return std::vector<char>(data, data + tvm::ffi::GetDataSize(tensor));
  }

  void ReadManifest(const std::string& folder) {
    if (!std::ifstream(folder + "/manifest.txt")) {
      throw std::runtime_error(folder + " is no bundle: it has no manifest.txt");
    }
    std::string whole = ReadFile(folder + "/manifest.txt");
    size_t end = whole.rfind("end ");
    std::string format = whole.substr(0, whole.find('\n'));
    if (format != "format 2") throw std::runtime_error("manifest.txt has " + format + ", this runner reads format 2");
    if (end == std::string::npos || whole.substr(end) != "end " + Sha256(whole.substr(0, end)) + "\n") {
      throw std::runtime_error("manifest.txt was changed or cut off; copy the bundle again");
    }
    std::istringstream lines(whole);
    std::string target, missing;
    for (std::string text; std::getline(lines, text);) {
      std::istringstream line(text);
      std::string kind, rest;
      line >> kind;
      if (kind == "target") {
        line >> rest;
        if (rest != kMachine) throw std::runtime_error("the bundle is made for " + rest + ", this runner for " + kMachine);
        std::getline(line >> std::ws, target);
      } else if (kind == "feature") {
        line >> rest;
        if (!HasFeature(rest, line)) missing += (missing.empty() ? "" : ", ") + rest;
      } else if (kind == "file") {
        std::string hash;
        line >> hash >> rest;
        if (Sha256(ReadFile(folder + "/" + rest)) != hash) {
          throw std::runtime_error(rest + " does not fit manifest.txt: it was changed or damaged; copy the bundle again");
        }
      } else if (kind == "program") {
        line >> rest;
        programs.push_back({rest, {}, {}});
      } else if (kind == "input" || kind == "output") {
        TensorInfo info;
        size_t rank = 0;
        line >> info.dtype >> rank;
        info.shape.resize(rank);
        for (int64_t& extent : info.shape) line >> extent;
        std::getline(line >> std::ws, info.name);
        Program& program = programs.back();
        (kind == "input" ? program.inputs : program.outputs).push_back(info);
      }
    }
    if (!missing.empty()) {
      throw std::runtime_error("the network is compiled for " + target + " and uses " + missing +
                               ", which this CPU does not have; compile it for this board");
    }
  }

  std::optional<tvm::ffi::Module> library_, machine_;
};

}  // namespace qfp8
