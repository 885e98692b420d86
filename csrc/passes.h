// The passes over tensors of full size, for one instruction set.
//
// No include guards, here and in what this includes: instruction_sets.h includes
// it once for every instruction set, in a namespace of its own, with
//   VECTOR_BYTES             the size of a register
//   TARGET                   the attribute that has a function compiled for it
//   LOAD_HALF, STORE_HALF    its conversions of float16, if it has any
//   LOAD_WORDS               16 bits to 32, if the compiler does it badly
//
// There are two layouts. Rows: `count` rows of `length` values, one after the
// other. Columns: `length` positions of `count` values each (channels-last).
// Either way there are `count` coefficients of each kind, and `count` results.
// Sums are those of blocks, in the lanes of registers; blocks add up in double.

#include "vectors.h"
#include "rows.h"
#include "columns.h"
#include "stages.h"

template <class T> Passes<T> passes(bool columns, bool relu) {
  if (columns)
    return relu ? Passes<T>{column_moments<T>, column_apply<T, true>,
                            column_reduce<T, true>, add<T, true>,
                            column_apply_add<T, true>}
                : Passes<T>{column_moments<T>, column_apply<T, false>,
                            column_reduce<T, false>, add<T, false>,
                            column_apply_add<T, false>};
  return relu ? Passes<T>{row_moments<T>, row_apply<T, true>, row_reduce<T, true>,
                          add<T, true>, row_apply_add<T, true>}
              : Passes<T>{row_moments<T>, row_apply<T, false>, row_reduce<T, false>,
                          add<T, false>, row_apply_add<T, false>};
}

template <class A> Algebra<A> algebra(int64_t depth) {
  switch (depth) {
    case 2: return {stages<2, A>, stages_backward<2, A>, keep<A>};
    case 4: return {stages<4, A>, stages_backward<4, A>, keep<A>};
    case 8: return {stages<8, A>, stages_backward<8, A>, keep<A>};
    case 16: return {stages<16, A>, stages_backward<16, A>, keep<A>};
    default: return {stages<0, A>, stages_backward<0, A>, keep<A>};
  }
}

#undef INLINE
#undef TARGET
#undef VECTOR_BYTES
#undef LOAD_WORDS
#undef LOAD_HALF
#undef STORE_HALF
