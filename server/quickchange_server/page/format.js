// Figures as people read them.

const LOCALE = "en";
const whole = new Intl.NumberFormat(LOCALE, { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat(LOCALE, { maximumSignificantDigits: 3 });
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export const NONE = "–";

/** 1234567 as "1,234,567". */
export const count = (value) => whole.format(value);

/** Three significant digits; + 0 because -0 is no figure. */
export const number = (value) =>
  value === null ? NONE : short.format(value + 0).replace("-", "−");

/** A share of one as per cent, two decimals at most. */
export function percent(value) {
  return value === null ? NONE : `${number(Math.round(value * 1e4) / 100)} %`;
}

/** A probability as per cent that never claims certainty. */
export function probability(value) {
  if (value === null) return NONE;
  if (value > 0.999) return "> 99.9 %";
  if (value < 0.001) return "< 0.1 %";
  return `${(value * 100).toFixed(1)} %`;
}

/** A p-value. */
export const pValue = (value) => (value !== null && value < 0.0001 ? "< 0.0001" : number(value));

/** 1536 as "1.5 KiB". */
export function bytes(value) {
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toFixed(1)} ${UNITS[unit]}`;
}

/** Seconds as "85 ms" or "1.24 s". */
export function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`;
}
