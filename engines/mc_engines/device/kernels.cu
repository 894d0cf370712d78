// Moving rows between arrays on a GPU. A row is a token; a plane is an attention head.

#define UNIT 16  // bytes that a thread moves at once

struct alignas(UNIT) Unit {
  unsigned int words[4];
};

// Where a row lies: in units from the start of the array. `rows` may be null: then row r is row r.
__device__ static inline long long place(const int* rows, long long plane, long long row,
                                         long long plane_rows, long long row_units) {
  long long chosen = rows ? rows[row] : row;
  return chosen < 0 ? -1 : (plane * plane_rows + chosen) * row_units;
}

// target[plane][to[r]] = source[plane][from[r]] for r < count; a negative row is left out.
extern "C" __global__ void move_rows(const Unit* source, const int* from, long long source_rows,
                                     Unit* target, const int* to, long long target_rows,
                                     long long planes, long long count, long long row_units) {
  long long all = planes * count * row_units;
  long long step = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    long long unit = i % row_units;
    long long row = i / row_units % count;
    long long plane = i / row_units / count;
    long long get = place(from, plane, row, source_rows, row_units);
    long long put = place(to, plane, row, target_rows, row_units);
    if (get >= 0 && put >= 0) target[put + unit] = source[get + unit];
  }
}
