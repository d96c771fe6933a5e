// e^x, once for each instruction set: included after isa_*.h.
#pragma once

namespace {

// e^x for x <= 0: e^x = 2^n * e^r, |r| <= ln(2) / 2, and Taylor's polynomial of degree 7 (its
// remainder is below 4e-9). What float32 cannot hold becomes 0.
inline V exp_negative(V x) {
  const V floored = vmax(splat(-87.0f), x);  // in this order a NaN stays
  const V n = round_even(mul(floored, splat(1.44269504f)));
  V r = fma(n, splat(-0.693145752f), floored);
  r = fma(n, splat(-1.42860677e-6f), r);
  V p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return mul(p, power_of_two(n));
}

// 1 / (1 + e^-x)
inline V sigmoid(V x) {
  const V e = exp_negative(sub(zero(), vabs(x))), one = splat(1.0f);
  return vdiv(where_negative(x, e, one), add(one, e));
}

}  // namespace
