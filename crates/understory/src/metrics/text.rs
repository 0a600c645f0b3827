//! The text format of Prometheus, version 0.0.4.
//!
//! Source: "Exposition formats" of the Prometheus documentation; checked with the parser of its Python client
//! (`tests/prometheus/run`). Pure: a snapshot in, text out.

use super::snapshot::{Family, Kind, Snapshot, Value};
use std::collections::BTreeMap;
use std::fmt::Write;

impl Snapshot {
    /// All numbers in the text format of Prometheus.
    pub fn to_prometheus(&self) -> String {
        let mut out = String::new();
        for (name, family) in self.families() {
            // Writing to a string cannot fail.
            let _ = write_family(&mut out, name, family);
        }
        out
    }
}

fn write_family(out: &mut String, name: &str, family: &Family) -> std::fmt::Result {
    let kind = match family.kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram => "histogram",
    };
    let help = family.help.replace('\\', r"\\").replace('\n', r"\n");
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}")?;
    for sample in &family.samples {
        let labels = |more: Option<&str>| labels(&sample.labels, more);
        match &sample.value {
            Value::Whole { value } => writeln!(out, "{name}{} {value}", labels(None))?,
            Value::Real { value } => writeln!(out, "{name}{} {value}", labels(None))?,
            Value::Histogram {
                count,
                sum,
                buckets,
            } => {
                for bucket in buckets {
                    let le = bucket.le.to_string();
                    writeln!(out, "{name}_bucket{} {}", labels(Some(&le)), bucket.count)?;
                }
                writeln!(out, "{name}_bucket{} {count}", labels(Some("+Inf")))?;
                writeln!(out, "{name}_sum{} {sum}", labels(None))?;
                writeln!(out, "{name}_count{} {count}", labels(None))?;
            }
        }
    }
    Ok(())
}

fn labels(labels: &BTreeMap<String, String>, le: Option<&str>) -> String {
    let mut pairs: Vec<String> = labels
        .iter()
        .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
        .collect();
    pairs.extend(le.map(|le| format!("le=\"{le}\"")));
    if pairs.is_empty() {
        return String::new();
    }
    format!("{{{}}}", pairs.join(","))
}

fn escape(value: &str) -> String {
    value
        .replace('\\', r"\\")
        .replace('"', r#"\""#)
        .replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::Bucket;
    use super::*;

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let mut s = Snapshot::default();
        s.counter(
            "understory_a_total",
            "A \\ line\nand more.",
            &[("kind", "x\"\\\n"), ("a", "1")],
            3,
        );
        s.gauge("understory_b", "B.", &[], u64::MAX);
        s.seconds("understory_c_seconds_total", "C.", &[], 0.25);
        s.histogram(
            "understory_d_seconds",
            "D.",
            &[("kind", "x")],
            Value::Histogram {
                count: 3,
                sum: 1.5,
                buckets: vec![Bucket {
                    le: 0.000_002,
                    count: 2,
                }],
            },
        );
        assert_eq!(
            s.to_prometheus(),
            "# HELP understory_a_total A \\\\ line\\nand more.\n\
             # TYPE understory_a_total counter\n\
             understory_a_total{a=\"1\",kind=\"x\\\"\\\\\\n\"} 3\n\
             # HELP understory_b B.\n\
             # TYPE understory_b gauge\n\
             understory_b 18446744073709551615\n\
             # HELP understory_c_seconds_total C.\n\
             # TYPE understory_c_seconds_total counter\n\
             understory_c_seconds_total 0.25\n\
             # HELP understory_d_seconds D.\n\
             # TYPE understory_d_seconds histogram\n\
             understory_d_seconds_bucket{kind=\"x\",le=\"0.000002\"} 2\n\
             understory_d_seconds_bucket{kind=\"x\",le=\"+Inf\"} 3\n\
             understory_d_seconds_sum{kind=\"x\"} 1.5\n\
             understory_d_seconds_count{kind=\"x\"} 3\n"
        );
    }
}
