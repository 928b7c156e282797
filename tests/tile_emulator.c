/* The tile instructions that kernels use, as functions: for CPUs without tile registers (AMX).

   After the pseudocode of the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2. */

#include <stdint.h>
#include <string.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };

static _Thread_local uint8_t tiles[TILES][ROWS][ROW_BYTES];
static _Thread_local int rows[TILES], row_bytes[TILES];

int tile_ldtilecfg(const uint8_t *config) {
  memset(tiles, 0, sizeof tiles);
  for (int t = 0; t < TILES; ++t) {
    row_bytes[t] = config[16 + 2 * t] | config[17 + 2 * t] << 8;
    rows[t] = config[48 + t];
  }
  return 0;
}

int tile_tilerelease(void) {
  memset(rows, 0, sizeof rows);
  return 0;
}

int tile_tilezero(int t) {
  memset(tiles[t], 0, sizeof tiles[t]);
  return 0;
}

int tile_tileloadd64(int t, const uint8_t *from, int64_t stride) {
  tile_tilezero(t);
  for (int r = 0; r < rows[t]; ++r) memcpy(tiles[t][r], from + r * stride, row_bytes[t]);
  return 0;
}

int tile_tilestored64(int t, uint8_t *to, int64_t stride) {
  for (int r = 0; r < rows[t]; ++r) memcpy(to + r * stride, tiles[t][r], row_bytes[t]);
  return 0;
}

static float bfloat16(const uint8_t *at) {
  uint32_t bits = (uint32_t)(at[0] | at[1] << 8) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

int tile_tdpbf16ps(int sums, int a, int b) {
  for (int m = 0; m < rows[sums]; ++m)
    for (int k = 0; k < row_bytes[a] / 4; ++k)
      for (int n = 0; n < row_bytes[sums] / 4; ++n) {
        float total;
        memcpy(&total, tiles[sums][m] + 4 * n, 4);
        for (int i = 0; i < 4; i += 2)
          total += bfloat16(tiles[a][m] + 4 * k + i) * bfloat16(tiles[b][k] + 4 * n + i);
        memcpy(tiles[sums][m] + 4 * n, &total, 4);
      }
  return 0;
}

static int bytes(int sums, int a, int b, int is_signed) {
  for (int m = 0; m < rows[sums]; ++m)
    for (int k = 0; k < row_bytes[a] / 4; ++k)
      for (int n = 0; n < row_bytes[sums] / 4; ++n) {
        int32_t total;
        memcpy(&total, tiles[sums][m] + 4 * n, 4);
        for (int i = 0; i < 4; ++i) {
          uint8_t x = tiles[a][m][4 * k + i];
          total += (is_signed ? (int8_t)x : x) * (int8_t)tiles[b][k][4 * n + i];
        }
        memcpy(tiles[sums][m] + 4 * n, &total, 4);
      }
  return 0;
}

int tile_tdpbssd(int sums, int a, int b) { return bytes(sums, a, b, 1); }

int tile_tdpbusd(int sums, int a, int b) { return bytes(sums, a, b, 0); }
