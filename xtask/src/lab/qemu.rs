//! The emulator: QEMU 10 or newer, this machine's own or Debian's from backports, unpacked and not installed.
//!
//! QEMU 7.2, Debian 12's own, loses XCR0 in nested guests (the kernel says "XSAVE consistency problem", and AVX raises #UD),
//! and now and then a whole guest. Installing another one would change what this machine's tests and benchmarks compare with.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use command_line::note;
use tempfile::TempDir;

use super::initramfs::libraries_of;
use super::kernel;
use crate::host;
use crate::step::run;

const PROGRAM: &str = "qemu-system-x86_64";
/// The oldest that does, by its first number.
const OLDEST: u32 = 10;
/// What is fetched, with whatever it needs that this machine has not.
const PACKAGE: &str = "qemu-system-x86";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What it needs of its data to boot a kernel that it is given.
const DATA: [&str; 4] = ["bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin"];
/// Where Debian's packages install that.
const INSTALLED_DATA: [&str; 2] = ["/usr/share/qemu", "/usr/share/seabios"];
/// Starts it where no library is installed.
const START: &str = r#"#!/bin/sh
here=$(dirname "$0")
exec "$here/ld-linux-x86-64.so.2" --library-path "$here" "$here/qemu-system-x86_64" -L "$here" "$@"
"#;

/// An emulator that does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Qemu {
    program: PathBuf,
    /// The folder where it was unpacked; none where it is installed.
    unpacked: Option<PathBuf>,
}

impl Qemu {
    /// The installed one where it is new enough, else the one in the cache, else fetched now.
    ///
    /// # Errors
    /// When there is none and it cannot be fetched.
    pub(super) fn get() -> Result<Self> {
        if let Some(program) = host::find_program(PROGRAM)
            && version_of(&program).is_some_and(|version| version >= OLDEST)
        {
            return Ok(Self { program, unpacked: None });
        }
        let cache = kernel::cache()?.join("qemu");
        fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
        let kept = match newest(&cache) {
            Some(kept) => kept,
            None => fetch(&cache).with_context(|| {
                format!("the lab needs {PROGRAM} of version {OLDEST} or newer, and cannot fetch it: install one")
            })?,
        };
        Ok(Self::unpacked_in(&kept))
    }

    fn unpacked_in(folder: &Path) -> Self {
        Self { program: folder.join("usr/bin").join(PROGRAM), unpacked: Some(folder.to_owned()) }
    }

    /// It, with what it needs to find its files, and no other options yet.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(folder) = &self.unpacked {
            let libraries = folder.join("usr/lib/x86_64-linux-gnu");
            command.env("QEMU_MODULE_DIR", libraries.join("qemu")).env("LD_LIBRARY_PATH", libraries);
        }
        command.args(self.data_folders().iter().flat_map(|folder| ["-L".into(), folder.clone().into_os_string()]));
        command
    }

    /// Copies it into a folder, with its libraries and what it needs to boot a kernel, and a script `run` that starts it there.
    ///
    /// # Errors
    /// When a file is missing.
    pub(super) fn copy_to(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let mut ldd = Command::new("ldd");
        let command = self.command();
        ldd.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?)))).arg(&self.program);
        let mut files = libraries_of(&mut ldd)?;
        files.push(self.program.clone());
        let installed = INSTALLED_DATA.map(PathBuf::from);
        let data = [self.data_folders(), installed.into()].concat();
        for name in DATA {
            let found = data.iter().map(|folder| folder.join(name)).find(|path| path.is_file());
            files.push(
                found.with_context(|| format!("QEMU's {name} is missing: install seabios and qemu-system-data"))?,
            );
        }
        for file in &files {
            let copy = folder.join(file.file_name().unwrap_or_default());
            fs::copy(file, &copy).with_context(|| file.display().to_string())?;
        }
        let script = folder.join("run");
        fs::write(&script, START)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// Where its firmware and option ROMs are, if not where it looks itself.
    fn data_folders(&self) -> Vec<PathBuf> {
        let folders =
            |unpacked: &PathBuf| ["usr/share/qemu", "usr/share/seabios"].map(|name| unpacked.join(name)).into();
        self.unpacked.as_ref().map_or_else(Vec::new, folders)
    }
}

/// The first number of a program's version.
fn version_of(program: &Path) -> Option<u32> {
    let output = Command::new(program).arg("--version").output().ok()?;
    parse_version(&String::from_utf8_lossy(&output.stdout))
}

/// From `QEMU emulator version 10.0.2 (Debian …)`.
fn parse_version(text: &str) -> Option<u32> {
    text.split_once("version ")?.1.split('.').next()?.parse().ok()
}

/// What was unpacked last, each in a folder of its version's name.
fn newest(cache: &Path) -> Option<PathBuf> {
    let folders = fs::read_dir(cache).ok()?.flatten().map(|entry| entry.path());
    folders.filter(|folder| folder.join("usr/bin").join(PROGRAM).is_file()).max()
}

/// Fetches Debian's from backports and unpacks it into a folder of the cache.
fn fetch(cache: &Path) -> Result<PathBuf> {
    ensure!(host::find_program("apt-get").is_some(), "there is no apt-get");
    note(format_args!("fetching {PACKAGE} from Debian's backports into {}", cache.display()));
    let folder = TempDir::with_prefix_in("part-", cache).context("no room to fetch packages")?;
    let apt = PrivateApt::new(folder.path())?;
    run(apt.get().arg("update"))?;
    let mut install = apt.get();
    // What is installed here counts as there. Nothing else is written to than the private folders, so that no lock is needed.
    install.args(["--yes", "--download-only", "--no-install-recommends", "--target-release", &apt.backports]);
    run(install.args(["install", PACKAGE]))?;
    let packages: Vec<_> = fs::read_dir(apt.archives())?.flatten().map(|entry| entry.path()).collect();
    let packages: Vec<_> = packages.iter().filter(|path| path.extension().is_some_and(|end| end == "deb")).collect();
    let root = folder.path().join("root");
    for package in &packages {
        run(Command::new("dpkg-deb").arg("--extract").arg(package).arg(&root))?;
    }
    let program = Qemu::unpacked_in(&root).program;
    if version_of(&program).is_none_or(|version| version < OLDEST) {
        bail!("{} has none", apt.backports);
    }
    let is_ours = |path: &&&PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&format!("{PACKAGE}_")))
    };
    let name = packages.iter().find(is_ours).and_then(|path| path.file_stem()).context("apt-get fetched nothing")?;
    let kept = cache.join(name);
    match fs::rename(&root, &kept) {
        // Another run was quicker.
        Err(_) if kept.is_dir() => Ok(kept),
        result => result.map(|()| kept).context("the packages cannot be kept"),
    }
}

/// apt with sources, lists and archives of its own: this machine's mirror, with backports besides.
struct PrivateApt {
    folder: PathBuf,
    /// The release's name, such as `bookworm-backports`.
    backports: String,
}

impl PrivateApt {
    fn new(folder: &Path) -> Result<Self> {
        let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
        let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
        let codename = codename.context("/etc/os-release names no release")?.trim_matches('"');
        let targets = Command::new("apt-get")
            .args(["indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"])
            .output()
            .context("apt-get cannot be started")?;
        let mirror = mirror_of(&String::from_utf8_lossy(&targets.stdout), codename)
            .with_context(|| format!("this machine's apt has no source for {codename} main"))?;
        let backports = format!("{codename}-backports");
        for name in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(name))?;
        }
        fs::write(folder.join("sources.list"), sources(&mirror, codename, Path::new(KEYRING).is_file()))?;
        Ok(Self { folder: folder.to_owned(), backports })
    }

    fn archives(&self) -> PathBuf {
        self.folder.join("cache/archives")
    }

    fn get(&self) -> Command {
        let mut apt = Command::new("apt-get");
        apt.env("LC_ALL", "C").arg("--quiet=2");
        let place = |option: &str, name: &str| {
            let mut text = OsString::from(format!("{option}="));
            text.push(self.folder.join(name));
            text
        };
        let places = [
            place("Dir::Etc::SourceList", "sources.list"),
            place("Dir::State::Lists", "lists"),
            place("Dir::Cache", "cache"),
        ];
        apt.args(places.into_iter().flat_map(|place| ["--option".into(), place]));
        for option in ["Dir::Etc::SourceParts=-", "Debug::NoLocking=1", "APT::Sandbox::User=root"] {
            apt.args(["--option", option]);
        }
        apt
    }
}

/// The mirror that this machine gets the release's main part from, out of `RELEASE COMPONENT URI` lines.
fn mirror_of(targets: &str, codename: &str) -> Option<String> {
    let mut lines = targets.lines().map(|line| line.split_whitespace());
    lines.find_map(|mut words| {
        let is_main = words.next()? == codename && words.next()? == "main";
        words.next().filter(|_| is_main).map(str::to_owned)
    })
}

fn sources(mirror: &str, codename: &str, has_keyring: bool) -> String {
    let signed = if has_keyring { format!("[signed-by={KEYRING}] ") } else { String::new() };
    ["", "-backports"].map(|part| format!("deb {signed}{mirror} {codename}{part} main\n")).concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright"), Some(10));
        assert_eq!(parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2)\n"), Some(7));
        assert_eq!(parse_version("qemu"), None);
    }

    #[test]
    fn backports_come_from_where_the_release_does() {
        let targets =
            "book-updates main ftp://a/\nbook contrib ftp://b/\nbook main ftp://c/debian/\nbook main ftp://d/\n";
        assert_eq!(mirror_of(targets, "book").as_deref(), Some("ftp://c/debian/"));
        assert_eq!(mirror_of(targets, "case"), None);
        assert_eq!(
            sources("ftp://c/debian/", "book", false),
            "deb ftp://c/debian/ book main\ndeb ftp://c/debian/ book-backports main\n"
        );
        assert!(sources("ftp://c/debian/", "book", true).starts_with(&format!("deb [signed-by={KEYRING}] ftp:")));
    }

    #[test]
    fn an_unpacked_one_brings_its_files() {
        let cache = TempDir::new().unwrap();
        assert_eq!(newest(cache.path()), None);
        let folder = cache.path().join("qemu-10");
        fs::create_dir_all(folder.join("usr/bin")).unwrap();
        assert_eq!(newest(cache.path()), None, "half of one");
        fs::write(folder.join("usr/bin").join(PROGRAM), "").unwrap();
        assert_eq!(newest(cache.path()), Some(folder.clone()));
        let command = Qemu::unpacked_in(&folder).command();
        let words: Vec<_> = command.get_args().collect();
        assert_eq!(
            words,
            [
                "-L",
                folder.join("usr/share/qemu").to_str().unwrap(),
                "-L",
                folder.join("usr/share/seabios").to_str().unwrap()
            ]
        );
        assert!(command.get_envs().any(|(name, _)| name == "QEMU_MODULE_DIR"));
        let installed = Qemu { program: "qemu".into(), unpacked: None }.command();
        assert_eq!((installed.get_args().count(), installed.get_envs().count()), (0, 0));
    }
}
