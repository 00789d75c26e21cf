// Reads Prometheus' text format.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

// Samples of an exposition: [{name, labels, value}].
export function parseMetrics(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : LINE.exec(line);
    if (!found) continue;
    const labels = Object.fromEntries([...(found[2] || "").matchAll(LABEL)].map((pair) => [pair[1], pair[2]]));
    samples.push({ name: found[1], labels, value: Number(found[3].replace("Inf", "Infinity")) });
  }
  return samples;
}

// The sum over all label sets of one metric; undefined when the server has none of that name.
export function total(samples, name) {
  const found = samples.filter((sample) => sample.name === name);
  return found.length ? found.reduce((sum, sample) => sum + sample.value, 0) : undefined;
}

// A quantile of what a histogram counted between two readings, by linear interpolation in its bucket; undefined for nothing.
export function quantile(before, after, name, share) {
  const at = (samples) => {
    const sums = new Map();
    for (const { name: found, labels, value } of samples) {
      if (found !== `${name}_bucket`) continue;
      const bound = Number(labels.le.replace("Inf", "Infinity"));
      sums.set(bound, (sums.get(bound) || 0) + value);
    }
    return sums;
  };
  const old = at(before);
  const buckets = [...at(after)].sort((a, b) => a[0] - b[0]).map(([bound, count]) => [bound, count - (old.get(bound) || 0)]);
  const all = buckets.length ? buckets[buckets.length - 1][1] : 0;
  if (!all) return undefined;
  let low = 0, below = 0;
  for (const [bound, count] of buckets) {
    if (count >= share * all) {
      if (bound === Infinity) return low;
      return low + ((bound - low) * (share * all - below)) / Math.max(1e-9, count - below);
    }
    [low, below] = [bound, count];
  }
  return low;
}
