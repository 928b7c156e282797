// Runs the network of the bundle that this program lies in.
//
//   run INPUT.npy ...       inputs in the order of manifest.txt; outputs go to output_0.npy, output_1.npy ...
#include <chrono>
#include <filesystem>
#include <iostream>

#include "qfp8_model.h"

namespace {

// What NumPy calls a dtype in a .npy header.
std::string NumpyDtype(const std::string& dtype) {
  if (dtype == "bool") return "|b1";
  size_t digit = dtype.find_first_of("0123456789");
  int bytes = std::stoi(dtype.substr(digit)) / 8;
  return std::string(bytes == 1 ? "|" : "<") + dtype[0] + std::to_string(bytes);
}

std::string Header(const qfp8::TensorInfo& info) {
  std::string shape;
  for (int64_t extent : info.shape) shape += std::to_string(extent) + ", ";
  if (info.shape.size() > 1) shape.resize(shape.size() - 2);
  if (info.shape.size() == 1) shape.resize(shape.size() - 1);
  std::string text = "{'descr': '" + NumpyDtype(info.dtype) + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  while ((10 + text.size() + 1) % 64 != 0) text += ' ';
  return text + '\n';
}

// The header is compared without spaces: NumPy pads it.
std::string Compact(std::string text) {
  std::string found;
  for (char c : text) {
    if (c != ' ' && c != '\n') found += c;
  }
  return found;
}

struct Npy {
  std::string path, header;
  std::vector<char> data;
};

Npy ReadNpy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> data((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (data.size() < 10 || std::memcmp(data.data(), "\x93NUMPY", 6) != 0) {
    throw std::runtime_error(path + " is no .npy file");
  }
  size_t wide = data[6] >= 2 ? 4 : 2, length = 0;
  for (size_t i = 0; i < wide; ++i) length |= size_t(static_cast<unsigned char>(data[8 + i])) << (8 * i);
  size_t start = 8 + wide;
  if (data.size() < start + length) throw std::runtime_error(path + " is cut off");
  return {path, std::string(data.begin() + start, data.begin() + start + length),
          std::vector<char>(data.begin() + start + length, data.end())};
}

// Dtypes and shapes have to be those of one of the network's programs; the error names what the longest takes.
void CheckHeaders(const qfp8::Model& model, const std::vector<Npy>& files) {
  std::string found;
  for (const qfp8::Program& program : model.programs) {
    found.clear();
    for (size_t i = 0; i < files.size() && found.empty(); ++i) {
      const qfp8::TensorInfo& info = program.inputs[i];
      if (Compact(files[i].header) == Compact(Header(info))) continue;
      found = files[i].path + " holds " + files[i].header + "input " + info.name + " is " + Header(info);
    }
    if (found.empty()) return;
  }
  throw std::runtime_error(found);
}

void WriteNpy(const std::string& path, const std::vector<char>& data, const qfp8::TensorInfo& info) {
  std::string header = Header(info);
  std::ofstream file(path, std::ios::binary);
  file.write("\x93NUMPY\x01\x00", 8);
  file.put(static_cast<char>(header.size() & 255)).put(static_cast<char>(header.size() >> 8));
  file << header;
  file.write(data.data(), static_cast<std::streamsize>(data.size()));
  if (!file) throw std::runtime_error("cannot write " + path);
}

int Run(int argc, char** argv) {
  qfp8::Model model(std::filesystem::canonical(argv[0]).parent_path().string());
  if (argc - 1 != static_cast<int>(model.inputs.size())) {
    std::cerr << "usage: run";
    for (const auto& info : model.inputs) std::cerr << " " << info.name << ".npy";
    std::cerr << "\n";
    return 2;
  }
  std::vector<std::vector<char>> values;
  std::vector<Npy> files;
  for (int i = 1; i < argc; ++i) files.push_back(ReadNpy(argv[i]));
  CheckHeaders(model, files);
  for (Npy& file : files) values.push_back(std::move(file.data));
  const std::vector<qfp8::TensorInfo>& infos = model.Fitting(values).outputs;
  auto started = std::chrono::steady_clock::now();
  auto outputs = model.Run(values);
  std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - started;
  for (size_t i = 0; i < outputs.size(); ++i) {
    std::string path = "output_" + std::to_string(i) + ".npy";
    WriteNpy(path, outputs[i], infos[i]);
    std::cout << infos[i].name << " -> " << path << "\n";
  }
  std::cout << elapsed.count() << " ms\n";
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "run: " << error.what() << "\n";
    return 1;
  }
}
