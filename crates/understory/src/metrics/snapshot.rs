//! Numbers with names and labels at one moment: what processes exchange, and what is shown.
//!
//! JSON (`/metrics.json`, the control socket), fields are only ever added:
//! ```text
//! {"understory_fuse_requests_total": {"type":"counter", "help":"…",
//!    "samples":[{"labels":{"kind":"read","mount":"live"}, "value":12}]},
//!  "understory_fuse_request_seconds": {"type":"histogram", "help":"…",
//!    "samples":[{"labels":{…}, "count":12, "sum":0.004, "buckets":[{"le":0.000002,"count":3}, …]}]}}
//! ```
//! Counts of buckets are cumulative, as in Prometheus; the bucket without an end is `count`.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a family's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Only grows, until the process starts again.
    Counter,
    /// What is now.
    Gauge,
    /// How many took how long.
    Histogram,
}

/// Everything at one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Snapshot {
    families: BTreeMap<String, Family>,
}

/// All numbers of one name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Family {
    /// What they are.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// One sentence.
    pub help: String,
    /// One for each set of labels.
    pub samples: Vec<Sample>,
}

/// A number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// What tells it from its siblings.
    pub labels: BTreeMap<String, String>,
    /// The number.
    #[serde(flatten)]
    pub value: Value,
}

/// A number, or several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// A count or an amount.
    Whole {
        /// It.
        value: u64,
    },
    /// Seconds.
    Real {
        /// It.
        value: f64,
    },
    /// How many took how long.
    Histogram {
        /// All of them.
        count: u64,
        /// Seconds, together.
        sum: f64,
        /// Ends ascend, counts are cumulative.
        buckets: Vec<Bucket>,
    },
}

/// How many were at most this.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    /// Its end, in seconds, inclusive.
    pub le: f64,
    /// All up to it.
    pub count: u64,
}

impl Value {
    /// The events of a histogram; a whole number itself.
    pub fn count(&self) -> u64 {
        match self {
            Self::Whole { value } => *value,
            Self::Real { .. } => 0,
            Self::Histogram { count, .. } => *count,
        }
    }
    /// As a number for arithmetic; a histogram's count.
    #[expect(clippy::cast_precision_loss, reason = "for rates and graphs")]
    pub fn number(&self) -> f64 {
        match self {
            Self::Whole { value } => *value as f64,
            Self::Real { value } => *value,
            Self::Histogram { count, .. } => *count as f64,
        }
    }
    /// Adds another process's number. Of histograms with other buckets only count and sum are added.
    fn add(&mut self, other: &Self) {
        match (self, other) {
            (Self::Whole { value }, Self::Whole { value: more }) => {
                *value = value.saturating_add(*more);
            }
            (
                Self::Histogram {
                    count,
                    sum,
                    buckets,
                },
                Self::Histogram {
                    count: more_count,
                    sum: more_sum,
                    buckets: more,
                },
            ) => {
                *count = count.saturating_add(*more_count);
                *sum += more_sum;
                for (bucket, more) in buckets.iter_mut().zip(more) {
                    if bucket.le.to_bits() == more.le.to_bits() {
                        bucket.count = bucket.count.saturating_add(more.count);
                    }
                }
            }
            (this, other) => {
                *this = Self::Real {
                    value: this.number() + other.number(),
                };
            }
        }
    }
    /// The time within which the share `quantile` of the events was done, in seconds, interpolated in
    /// its bucket; `None` without events. What lies above the last bucket counts as its end.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    pub fn quantile(&self, quantile: f64) -> Option<f64> {
        let Self::Histogram { count, buckets, .. } = self else {
            return None;
        };
        if *count == 0 {
            return None;
        }
        let wanted = *count as f64 * quantile;
        let (mut start, mut below) = (0.0, 0.0);
        for bucket in buckets {
            let upto = bucket.count as f64;
            if upto >= wanted && upto > below {
                return Some(start + (bucket.le - start) * ((wanted - below) / (upto - below)));
            }
            (start, below) = (bucket.le, upto);
        }
        buckets.last().map(|bucket| bucket.le)
    }
}

impl Snapshot {
    /// Adds to a counter.
    pub fn counter(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: u64) {
        self.put(name, Kind::Counter, help, labels, Value::Whole { value });
    }
    /// Adds to a counter of seconds.
    pub fn seconds(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: f64) {
        self.put(name, Kind::Counter, help, labels, Value::Real { value });
    }
    /// Adds to a gauge.
    pub fn gauge(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: u64) {
        self.put(name, Kind::Gauge, help, labels, Value::Whole { value });
    }
    /// Adds to a histogram; `value` is one.
    pub fn histogram(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: Value) {
        self.put(name, Kind::Histogram, help, labels, value);
    }

    fn put(&mut self, name: &str, kind: Kind, help: &str, labels: &[(&str, &str)], value: Value) {
        let labels = labels
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        self.family(name, kind, help).add(Sample { labels, value });
    }

    fn family(&mut self, name: &str, kind: Kind, help: &str) -> &mut Family {
        self.families
            .entry(name.to_owned())
            .or_insert_with(|| Family {
                kind,
                help: help.to_owned(),
                samples: Vec::new(),
            })
    }

    /// Adds the numbers of another process: those with equal labels are summed.
    pub fn merge(&mut self, other: &Self) {
        for (name, family) in &other.families {
            let own = self.family(name, family.kind, &family.help);
            for sample in &family.samples {
                own.add(sample.clone());
            }
        }
    }

    /// All that counts up, without what merely is: what stays true of a process that has ended.
    #[must_use]
    pub fn without_gauges(&self) -> Self {
        Self {
            families: self
                .families
                .iter()
                .filter(|(_, family)| family.kind != Kind::Gauge)
                .map(|(name, family)| (name.clone(), family.clone()))
                .collect(),
        }
    }

    /// Names with their numbers, by name.
    pub fn families(&self) -> impl Iterator<Item = (&str, &Family)> {
        self.families
            .iter()
            .map(|(name, family)| (name.as_str(), family))
    }

    /// The samples of a name that have all of `labels`.
    pub fn samples<'a>(
        &'a self,
        name: &str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        let samples = self
            .families
            .get(name)
            .map_or(&[][..], |family| &family.samples);
        samples.iter().filter(move |sample| {
            labels
                .iter()
                .all(|(name, value)| sample.labels.get(*name).is_some_and(|v| v == value))
        })
    }

    /// The sum over the samples of a name that have all of `labels`; 0 if there are none.
    pub fn total(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.samples(name, labels).map(|s| s.value.number()).sum()
    }

    /// The samples of a histogram that have all of `labels`, as one.
    pub fn distribution(&self, name: &str, labels: &[(&str, &str)]) -> Option<Value> {
        let mut samples = self.samples(name, labels);
        let mut sum = samples.next()?.value.clone();
        samples.for_each(|sample| sum.add(&sample.value));
        Some(sum)
    }
}

impl Family {
    fn add(&mut self, sample: Sample) {
        match self.samples.iter_mut().find(|s| s.labels == sample.labels) {
            Some(own) => own.value.add(&sample.value),
            None => self.samples.push(sample),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Snapshot {
        let mut s = Snapshot::default();
        s.counter("understory_a_total", "A.", &[("kind", "x")], 3);
        s.counter("understory_a_total", "A.", &[("kind", "y")], 4);
        s.gauge("understory_b", "B.", &[("process", "p1")], 5);
        s.seconds("understory_c_seconds_total", "C.", &[], 0.5);
        s.histogram(
            "understory_d_seconds",
            "D.",
            &[("kind", "x")],
            Value::Histogram {
                count: 10,
                sum: 2.5,
                buckets: vec![Bucket { le: 0.1, count: 5 }, Bucket { le: 1.0, count: 9 }],
            },
        );
        s
    }

    #[test]
    fn merged_numbers_are_sums_and_processes_stay_apart() {
        let mut one = some();
        let mut two = some();
        two.gauge("understory_b", "B.", &[("process", "p2")], 7);
        two.counter("understory_new_total", "N.", &[], 1);
        one.merge(&two);
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} {b}");
        near(one.total("understory_a_total", &[("kind", "x")]), 6.0);
        near(one.total("understory_a_total", &[]), 14.0);
        near(one.total("understory_b", &[("process", "p2")]), 7.0);
        near(one.total("understory_c_seconds_total", &[]), 1.0);
        near(one.total("understory_new_total", &[]), 1.0);
        near(one.total("understory_none", &[]), 0.0);
        let d = one.distribution("understory_d_seconds", &[]).unwrap();
        assert_eq!(d.count(), 20);
        assert_eq!(one.without_gauges().families().count(), 4);
    }

    #[test]
    fn json_comes_back_as_it_was() {
        let text = serde_json::to_string(&some()).unwrap();
        assert!(
            text.contains(r#""understory_a_total":{"type":"counter","help":"A.","samples":[{"labels":{"kind":"x"},"value":3}"#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<Snapshot>(&text).unwrap(), some());
    }

    #[test]
    fn quantiles() {
        let d = some().distribution("understory_d_seconds", &[]).unwrap();
        let near = |a: Option<f64>, b: f64| assert!((a.unwrap() - b).abs() < 1e-9, "{a:?} {b}");
        near(d.quantile(0.25), 0.05);
        near(d.quantile(0.5), 0.1);
        near(d.quantile(0.7), 0.55);
        near(d.quantile(1.0), 1.0);
        let none = Value::Histogram {
            count: 0,
            sum: 0.0,
            buckets: vec![],
        };
        assert_eq!(none.quantile(0.5), None);
    }
}
