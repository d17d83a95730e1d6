//! `cargo xtask bench kernel`: what the project's kernel patches cost in instructions, and how right the answers are that
//! they give.
//!
//! The same program (`host-kernel/selftests/pm_swap_cost.c`) runs on the kernel with and without the patches, in a machine
//! whose time stamp counter counts instructions: a figure does not depend on the host, nor on what else that does. Not
//! counted is how long an instruction takes, so cache misses are not seen. Each round of a string instruction counts as one.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use serde_json::{Value, json};

use super::initramfs::{self, Contents};
use super::kernel::{self, Checks, Flavour, Series, Variant};
use super::machine::{self, Machine};
use super::payload;
use crate::packages;

/// Swap is on zram: what it costs is not hidden behind a disk's driver.
const SCRIPT: &str = "cd /lab
echo 512M > /sys/block/zram0/disksize && mkswap /dev/zram0 > /dev/null && swapon /dev/zram0 || echo 'LAB-PROBLEM no swap'
failed=0
for mode in cost accuracy; do
    echo \"LAB-BEGIN kernel $mode\"
    ./pm_swap_cost --$mode 2>&1
    code=$?
    [ $code = 0 ] || failed=1
    echo \"LAB-END $code kernel $mode\"
done
exit $failed
";
/// How long a machine may take. One took two to three minutes on a host of two processors that had other work too.
const LIMIT: Duration = Duration::from_secs(45 * 60);

/// What the project's kernel patches cost, in instructions, and how right the answers are that they give.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench kernel", bin_name = "cargo xtask bench kernel", max_term_width = 110)]
struct Arguments {
    /// Write the figures to this file too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often each kernel is booted.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Boot this image in place of building the kernel without patches.
    #[arg(long, value_name = "FILE")]
    stock_kernel: Option<PathBuf>,
    /// Boot this image in place of building the kernel with patches.
    #[arg(long, value_name = "FILE")]
    patched_kernel: Option<PathBuf>,
}

/// Measures with options as a person gave them, the benchmark's name first.
///
/// # Errors
/// When a kernel does not build or its machine does not come to an end. Not when a target is missed.
pub(crate) fn main(arguments: &[OsString]) -> Result<()> {
    let arguments = Arguments::parse_from(arguments);
    packages::ensure_installed_for_lab()?;
    let image = |given: &Option<PathBuf>, flavour| {
        let variant = Variant { series: Series::V6_12, flavour, checks: Checks::None };
        given.clone().map_or_else(|| kernel::build(variant), Ok)
    };
    let patched = image(&arguments.patched_kernel, Flavour::Patched)?;
    let stock = image(&arguments.stock_kernel, Flavour::Stock)?;
    payload::build_selftests().context("the lab's programs")?;
    let mut report = Report::default();
    for _ in 0..arguments.runs {
        report.stock.take(boot("cost-stock", &stock)?);
        report.patched.take(boot("cost-patched", &patched)?);
    }
    println!("\n{report}");
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&report.json(&stock, &patched))?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// What one boot came to.
fn boot(name: &str, kernel: &Path) -> Result<Figures> {
    let initramfs = initramfs::make(SCRIPT, Contents::default()).context("the lab's initramfs")?;
    let results = machine::run(&Machine {
        name,
        kernel,
        initramfs: &initramfs,
        counts_instructions: true,
        shows_everything: false,
        limit: LIMIT,
    })?;
    let log = fs::read_to_string(&results.log)?;
    if let Some(why) = log.lines().find_map(|line| line.strip_prefix("Bail out! ")) {
        bail!("nothing was measured on {}: {why}", kernel.display());
    }
    let is_whole = results.trials.len() == 2 && results.trials.iter().all(|trial| trial.code == 0);
    ensure!(is_whole, "the measurement did not come to its end; the machine's log is {}", results.log.display());
    Figures::parse(&log).with_context(|| results.log.display().to_string())
}

/// Instructions a page, of several repetitions.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cost {
    median: f64,
    min: f64,
    max: f64,
}

impl Cost {
    fn spread(self) -> f64 {
        self.max - self.min
    }

    fn json(self) -> Value {
        json!({ "median": self.median, "min": self.min, "max": self.max })
    }
}

/// How right a kernel's answers were after something was done to memory. Errors are per million pages.
#[derive(Clone, Debug, PartialEq)]
struct Accuracy {
    scenario: String,
    pages: u64,
    swapped: u64,
    marker: Errors,
    /// Not where there is no exact query.
    exact: Option<Errors>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Errors {
    false_positives: f64,
    false_negatives: f64,
}

/// What a kernel was measured to do.
#[derive(Debug, Default)]
struct Figures {
    /// In the order in which they were measured.
    names: Vec<String>,
    /// By name, one a boot.
    costs: BTreeMap<String, Vec<Cost>>,
    accuracy: Vec<Accuracy>,
}

impl Figures {
    /// From what the machine showed.
    fn parse(log: &str) -> Result<Self> {
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
    fn take(&mut self, other: Self) {
        self.names = other.names;
        for (name, costs) in other.costs {
            self.costs.entry(name).or_default().extend(costs);
        }
        self.accuracy = other.accuracy;
    }

    /// Of all boots: the median of the medians, the least and the most.
    fn cost(&self, name: &str) -> Option<Cost> {
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

/// What the patches may cost at most.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Target {
    /// Nothing: no more than the two kernels' repetitions differ among themselves.
    Nothing,
    /// So many per cent.
    Percent(f64),
}

/// The exact query's instructions, at most this part of what the same answer costs on a stock kernel.
const EXACT_RATIO: f64 = 0.2;

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.pad("0"),
            Self::Percent(percent) => f.pad(&format!("{percent} %")),
        }
    }
}

/// What has no target is published all the same.
fn target(name: &str) -> Option<Target> {
    let reading = ["pagemap-batch-", "pagemap-single-", "scan-"].iter().find_map(|start| name.strip_prefix(start));
    match (reading, name) {
        (Some("present" | "hole" | "swapped"), _) => Some(Target::Nothing),
        (_, "swap-in-sequential" | "swap-in-random" | "swap-in-write-sequential") => Some(Target::Percent(0.8)),
        (_, "swap-in-sequential-readahead" | "swap-in-random-readahead") => Some(Target::Percent(0.8)),
        (_, "reclaim-madvise" | "reclaim-cgroup") => Some(Target::Percent(1.0)),
        _ => None,
    }
}

/// A measurement on both kernels.
struct Comparison<'a> {
    name: &'a str,
    stock: Cost,
    patched: Cost,
    target: Option<Target>,
}

impl Comparison<'_> {
    /// Instructions a page that the patches cost.
    fn difference(&self) -> f64 {
        self.patched.median - self.stock.median
    }

    fn percent(&self) -> f64 {
        self.difference() / self.stock.median * 100.0
    }

    /// How far the repetitions on the two kernels lie apart, together; and what was rounded off.
    fn noise(&self) -> f64 {
        self.stock.spread() + self.patched.spread() + 0.01
    }

    fn is_met(&self) -> Option<bool> {
        Some(match self.target? {
            Target::Nothing => self.difference() <= self.noise(),
            Target::Percent(percent) => self.percent() <= percent,
        })
    }
}

/// The exact query, and what else has to be asked for the same.
struct ExactRow<'a> {
    range: &'a str,
    exact: Cost,
    others: Cost,
}

impl ExactRow<'_> {
    fn ratio(&self) -> f64 {
        self.exact.median / self.others.median
    }

    /// Where all is mapped nobody needs to ask the file: there is no target.
    fn is_met(&self) -> Option<bool> {
        (self.range != "present").then(|| self.ratio() <= EXACT_RATIO)
    }
}

#[derive(Default)]
struct Report {
    stock: Figures,
    patched: Figures,
}

impl Report {
    fn comparisons(&self) -> impl Iterator<Item = Comparison<'_>> {
        self.patched.names.iter().filter_map(|name| {
            let (stock, patched) = (self.stock.cost(name)?, self.patched.cost(name)?);
            Some(Comparison { name, stock, patched, target: target(name) })
        })
    }

    fn exact_rows(&self) -> impl Iterator<Item = ExactRow<'_>> {
        self.patched.names.iter().filter_map(|name| {
            let range = name.strip_prefix("exact-")?;
            let others = self.patched.cost(&format!("lseek-mincore-{range}"))?;
            Some(ExactRow { range, exact: self.patched.cost(name)?, others })
        })
    }

    fn json(&self, stock: &Path, patched: &Path) -> Value {
        let costs = self.comparisons().map(|row| {
            json!({
                "name": row.name,
                "stock": row.stock.json(),
                "patched": row.patched.json(),
                "difference": row.difference(),
                "percent": row.percent(),
                "noise": row.noise(),
                "target": row.target.map(|target| target.to_string()),
                "met": row.is_met(),
            })
        });
        let exact = self.exact_rows().map(|row| {
            json!({
                "range": row.range,
                "exact": row.exact.json(),
                "lseek_mincore": row.others.json(),
                "ratio": row.ratio(),
                "target": EXACT_RATIO,
                "met": row.is_met(),
            })
        });
        let accuracy = |figures: &Figures| {
            let errors = |errors: Errors| json!([errors.false_positives, errors.false_negatives]);
            let rows = figures.accuracy.iter().map(|row| {
                json!({
                    "scenario": row.scenario,
                    "pages": row.pages,
                    "swapped": row.swapped,
                    "marker": errors(row.marker),
                    "exact": row.exact.map(errors),
                })
            });
            rows.collect::<Vec<_>>()
        };
        json!({
            "unit": "instructions a page; accuracy: [false positives, false negatives] per million pages",
            "kernels": { "stock": stock, "patched": patched },
            "costs": costs.collect::<Vec<_>>(),
            "exact": exact.collect::<Vec<_>>(),
            "accuracy": { "stock": accuracy(&self.stock), "patched": accuracy(&self.patched) },
        })
    }
}

fn verdict(is_met: Option<bool>) -> &'static str {
    match is_met {
        Some(true) => "met",
        Some(false) => "MISSED",
        None => "",
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Instructions a page, medians. Noise: what the repetitions differ by, on both kernels together.")?;
        writeln!(
            f,
            "{:<32}{:>11}{:>11}{:>10}{:>9}{:>9}  {:<7}",
            "", "stock", "patched", "more", "%", "noise", "target"
        )?;
        for row in self.comparisons() {
            let target = row.target.map_or(String::new(), |target| target.to_string());
            writeln!(
                f,
                "{:<32}{:>11.2}{:>11.2}{:>+10.2}{:>+9.2}{:>9.2}  {target:<7}{}",
                row.name,
                row.stock.median,
                row.patched.median,
                row.difference(),
                row.percent(),
                row.noise(),
                verdict(row.is_met())
            )?;
        }
        writeln!(f, "\nThe exact query, and what gives the same answer without it, on the patched kernel.")?;
        writeln!(f, "{:<32}{:>11}{:>15}{:>9}  {:<7}", "", "exact", "lseek+mincore", "ratio", "target")?;
        for row in self.exact_rows() {
            let target = if row.is_met().is_some() { EXACT_RATIO.to_string() } else { String::new() };
            let (exact, others) = (row.exact.median, row.others.median);
            let verdict = verdict(row.is_met());
            writeln!(f, "{:<32}{exact:>11.2}{others:>15.2}{:>9.2}  {target:<7}{verdict}", row.range, row.ratio())?;
        }
        writeln!(f, "\nErrors per million pages: false positives / false negatives.")?;
        writeln!(
            f,
            "{:<20}{:>8}{:>9}{:>20}{:>20}{:>16}",
            "", "pages", "swapped", "pagemap, stock", "pagemap, patched", "exact query"
        )?;
        let pair = |errors: Errors| format!("{:.0} / {:.0}", errors.false_positives, errors.false_negatives);
        for row in &self.patched.accuracy {
            let stock = self.stock.accuracy.iter().find(|stock| stock.scenario == row.scenario);
            writeln!(
                f,
                "{:<20}{:>8}{:>9}{:>20}{:>20}{:>16}",
                row.scenario,
                row.pages,
                row.swapped,
                stock.map_or("-".into(), |stock| pair(stock.marker)),
                pair(row.marker),
                row.exact.map_or("-".into(), pair)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STOCK: &str = "# kernel: markers no (stock)\nCOST scan-hole 28.00 27.99 28.02\nCOST reclaim-madvise 1000.00 990 1010\n\
                         COST lseek-mincore-hole 500.00 500.00 500.00\nCOST munmap-swapped 10.00 10.00 10.00\n\
                         ACCURACY page-out 16384 8192 0 500000 - -\n";
    const PATCHED: &str = "COST scan-hole 28.04 28.03 28.05\nCOST reclaim-madvise 1011.00 1000 1020\nCOST exact-hole 99.00 98 100\n\
                           COST lseek-mincore-hole 500.00 500.00 500.00\nCOST munmap-swapped 60.00 60.00 60.00\n\
                           COST exact-present 99.00 99.00 99.00\nCOST lseek-mincore-present 100.00 100.00 100.00\n\
                           ACCURACY page-out 16384 8192 0 61 0 0\n";

    fn report() -> Report {
        Report { stock: Figures::parse(STOCK).unwrap(), patched: Figures::parse(PATCHED).unwrap() }
    }

    #[test]
    fn targets_are_judged() {
        let report = report();
        let met: BTreeMap<_, _> = report.comparisons().map(|row| (row.name.to_owned(), row.is_met())).collect();
        // 0.04 more, with repetitions that differ by 0.03 and 0.02.
        assert_eq!(met["scan-hole"], Some(true));
        // 1.1 % more of 1 %, whatever the noise.
        assert_eq!(met["reclaim-madvise"], Some(false));
        assert_eq!(met["munmap-swapped"], None);
        assert!(!met.contains_key("exact-hole"));
        let exact: Vec<_> = report.exact_rows().map(|row| (row.range, row.is_met())).collect();
        assert_eq!(exact, [("hole", Some(true)), ("present", None)]);
    }

    #[test]
    fn more_than_noise_is_missed() {
        let quiet = Cost { median: 28.0, min: 28.0, max: 28.0 };
        let row = |more: f64, target| {
            let patched = Cost { median: 28.0 + more, min: 28.0 + more, max: 28.0 + more };
            Comparison { name: "", stock: quiet, patched, target }.is_met()
        };
        assert_eq!(row(1.0, Some(Target::Nothing)), Some(false));
        assert_eq!(row(-1.0, Some(Target::Nothing)), Some(true));
        assert_eq!(row(0.1, Some(Target::Percent(0.8))), Some(true));
        assert_eq!(row(0.3, Some(Target::Percent(0.8))), Some(false));
        assert_eq!(row(1.0, None), None);
    }

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

    #[test]
    fn all_of_it_is_shown() {
        let report = report();
        let text = report.to_string();
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap_or_default().to_owned();
        assert!(line("reclaim-madvise").ends_with("1 %    MISSED"), "{text}");
        assert!(line("page-out").ends_with("0 / 500000              0 / 61           0 / 0"), "{text}");
        let json = report.json(Path::new("s"), Path::new("p"));
        assert_eq!(json["costs"][1]["met"], false);
        assert_eq!(json["accuracy"]["stock"][0]["exact"], Value::Null);
        assert_eq!(json["exact"][0]["ratio"], 0.198);
    }
}
