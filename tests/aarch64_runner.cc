// Runs one function of a compiled module without Python: only libtvm_ffi and libtvm_runtime are needed.
//
//   runner vm|prim LIBRARY.so FUNCTION FOLDER
//
// FOLDER/manifest.txt holds a line for each tensor: "in|out DTYPE NDIM EXTENT... FILE", FILE with raw values.
//   prim  calls FUNCTION(in..., out...) of the library: the manifest names the outputs.
//   vm    calls FUNCTION(in...) of a Relax virtual machine, which returns a tensor or a tuple of tensors.
// Outputs are written to FOLDER/out0.bin, ... and printed as manifest lines.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

// Kernels may load whole vectors from aligned addresses.
struct AlignedAllocator {
  void AllocData(DLTensor* tensor) {
    size_t bytes = ffi::GetDataSize(*tensor);
    tensor->data = std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

ffi::Tensor ReadTensor(std::istream& line, const std::string& folder, bool fill) {
  std::string dtype, file;
  int ndim = 0;
  line >> dtype >> ndim;
  std::vector<int64_t> shape(ndim);
  for (int64_t& extent : shape) line >> extent;
  line >> file;
  ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(AlignedAllocator(), ffi::Shape(shape.begin(), shape.end()),
                                                ffi::StringToDLDataType(dtype), DLDevice{kDLCPU, 0});
  if (fill) {
    std::ifstream data(folder + "/" + file, std::ios::binary);
    data.read(static_cast<char*>(tensor.data_ptr()), ffi::GetDataSize(tensor));
    if (!data) throw std::runtime_error("cannot read " + file);
  }
  return tensor;
}

void WriteTensor(const ffi::Tensor& tensor, const std::string& folder, int index) {
  std::string file = "out" + std::to_string(index) + ".bin";
  std::ofstream(folder + "/" + file, std::ios::binary)
      .write(static_cast<const char*>(tensor.data_ptr()), ffi::GetDataSize(tensor));
  std::cout << "out " << std::string(ffi::DLDataTypeToString(tensor.dtype())) << " " << tensor.ndim();
  for (int axis = 0; axis < tensor.ndim(); ++axis) std::cout << " " << tensor.size(axis);
  std::cout << " " << file << "\n";
}

int Run(const std::string& mode, const std::string& library, const std::string& name, const std::string& folder) {
  std::vector<ffi::Tensor> inputs, outputs;
  std::ifstream manifest(folder + "/manifest.txt");
  for (std::string kind; manifest >> kind;) {
    bool input = kind == "in";
    (input ? inputs : outputs).push_back(ReadTensor(manifest, folder, input));
  }
  std::vector<ffi::AnyView> arguments(inputs.begin(), inputs.end());
  ffi::Module module = ffi::Module::LoadFromFile(library);
  if (mode == "vm") {
    module = (*module->GetFunction("vm_load_executable"))().cast<ffi::Module>();
    constexpr int kPooledAllocator = 2;
    (*module->GetFunction("vm_initialization"))(static_cast<int>(kDLCPU), 0, kPooledAllocator);
  } else {
    arguments.insert(arguments.end(), outputs.begin(), outputs.end());
  }
  auto function = module->GetFunction(name);
  if (!function) throw std::runtime_error("the library has no function " + name);
  ffi::Any result;
  (*function).CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);
  if (mode == "vm") {
    if (auto tensor = result.as<ffi::Tensor>()) {
      outputs = {*tensor};
    } else {
      for (const ffi::Tensor& item : result.cast<ffi::Array<ffi::Tensor>>()) outputs.push_back(item);
    }
  }
  for (size_t i = 0; i < outputs.size(); ++i) WriteTensor(outputs[i], folder, static_cast<int>(i));
  return 0;
}

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: runner vm|prim LIBRARY.so FUNCTION FOLDER\n";
    return 2;
  }
  try {
    return Run(argv[1], argv[2], argv[3], argv[4]);
  } catch (const std::exception& error) {
    std::cerr << "runner: " << error.what() << "\n";
    return 1;
  }
}
