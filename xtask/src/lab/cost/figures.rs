//! What was measured, read from what the program in the machine prints.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// Instructions a page, of several repetitions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cost {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Cost {
    pub(super) fn spread(self) -> f64 {
        self.max - self.min
    }

    pub(super) fn json(self) -> Value {
        json!({ "median": self.median, "min": self.min, "max": self.max })
    }
}

/// How right a kernel's answers were after something was done to memory. Errors are per million pages.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Accuracy {
    pub(super) scenario: String,
    pub(super) pages: u64,
    pub(super) swapped: u64,
    pub(super) marker: Errors,
    /// Not where there is no exact query.
    pub(super) exact: Option<Errors>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Errors {
    pub(super) false_positives: f64,
    pub(super) false_negatives: f64,
}

/// What a kernel was measured to do.
#[derive(Debug, Default)]
pub(super) struct Figures {
    /// In the order in which they were measured.
    pub(super) names: Vec<String>,
    /// By name, one a boot.
    pub(super) costs: BTreeMap<String, Vec<Cost>>,
    pub(super) accuracy: Vec<Accuracy>,
}

impl Figures {
    /// From what the machine showed.
    pub(super) fn parse(log: &str) -> Result<Self> {
        let mut figures = Self::default();
        for line in log.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("COST") => {
                    let words: Vec<_> = words.collect();
                    let [name, median, min, max] = words[..] else { bail!("{line:?} is no measurement") };
                    let number = |word: &str| word.parse().with_context(|| format!("{line:?} is no measurement"));
                    let cost = Cost { median: number(median)?, min: number(min)?, max: number(max)? };
                    figures.names.push(name.to_owned());
                    figures.costs.insert(name.to_owned(), vec![cost]);
                }
                Some("ACCURACY") => {
                    figures.accuracy.push(parse_accuracy(words).with_context(|| format!("{line:?} is no comparison"))?);
                }
                _ => {}
            }
        }
        ensure!(!figures.names.is_empty() && !figures.accuracy.is_empty(), "nothing was measured");
        Ok(figures)
    }

    /// Takes in what another boot came to.
    pub(super) fn take(&mut self, other: Self) {
        self.names = other.names;
        for (name, costs) in other.costs {
            self.costs.entry(name).or_default().extend(costs);
        }
        self.accuracy = other.accuracy;
    }

    /// Of all boots: the median of the medians, the least and the most.
    pub(super) fn cost(&self, name: &str) -> Option<Cost> {
        let costs = self.costs.get(name)?;
        let mut medians: Vec<_> = costs.iter().map(|cost| cost.median).collect();
        medians.sort_by(f64::total_cmp);
        Some(Cost {
            median: *medians.get(medians.len() / 2)?,
            min: costs.iter().map(|cost| cost.min).fold(f64::INFINITY, f64::min),
            max: costs.iter().map(|cost| cost.max).fold(f64::NEG_INFINITY, f64::max),
        })
    }
}

fn parse_accuracy<'a>(words: impl Iterator<Item = &'a str>) -> Result<Accuracy> {
    let words: Vec<_> = words.collect();
    let [scenario, pages, swapped, rest @ ..] = &words[..] else { bail!("too few words") };
    let errors = |of: &[&str]| -> Result<Option<Errors>> {
        match of {
            ["-", "-"] => Ok(None),
            [fp, fn_] => Ok(Some(Errors { false_positives: fp.parse()?, false_negatives: fn_.parse()? })),
            _ => bail!("an odd number of words"),
        }
    };
    ensure!(rest.len() == 4, "not seven words");
    Ok(Accuracy {
        scenario: (*scenario).to_owned(),
        pages: pages.parse()?,
        swapped: swapped.parse()?,
        marker: errors(&rest[..2])?.context("no errors of the marker")?,
        exact: errors(&rest[2..])?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boots_are_put_together() {
        let mut figures = Figures::default();
        for median in [5.0, 3.0, 4.0] {
            figures.take(
                Figures::parse(&format!("COST a {median} {} {}\nACCURACY b 1 1 0 0 - -", median - 1.0, median + 1.0))
                    .unwrap(),
            );
        }
        assert_eq!(figures.cost("a"), Some(Cost { median: 4.0, min: 2.0, max: 6.0 }));
        assert_eq!((figures.cost("b"), figures.accuracy.len()), (None, 1));
    }

    #[test]
    fn what_is_no_figure_is_an_error() {
        for line in ["COST a 1 2", "COST a 1 2 x", "ACCURACY a 1 1 0 0 0", "ACCURACY a 1 1 - - 0 0", ""] {
            let log = format!("COST b 1 1 1\nACCURACY b 1 1 0 0 - -\n{line}");
            assert_eq!(Figures::parse(&log).is_err(), !line.is_empty(), "{line}");
        }
        assert!(Figures::parse("# nothing").is_err());
    }
}
