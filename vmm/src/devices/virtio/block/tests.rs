//! Disks with a driver that is right, and with some that are not.

mod engines;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::super::testing::{Driver, LIMIT, Notified, activation};
use super::*;
use crate::ram::{GuestRam, RamPage};

const RAM: u64 = 4 << 20;
const HEADER: u64 = 0x1_0000;
const STATUS: u64 = 0x1_1000;
const DATA: u64 = 0x10_0000;
const SECTORS: u64 = 256;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPPORTED: u8 = 2;

struct Machine {
    block: Block,
    driver: Driver,
    notified: Arc<Notified>,
    path: PathBuf,
    _folder: TempDir,
}

fn image(sectors: u64) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![0xd1; (sectors * SECTOR) as usize]).unwrap();
    (folder, path)
}

fn backend(path: &Path) -> DiskBackend {
    DiskBackend { path: path.into(), readonly: false, direct: false, is_raw: false }
}

fn config(readonly: bool) -> BlockConfig {
    let serial = "a-serial-number-that-is-long".into();
    BlockConfig { sectors: SECTORS, readonly, logical_block: 512, physical_block: 4096, serial, queues: 1 }
}

fn describe(config: &BlockConfig) -> DeviceDescription {
    let (id, kind) = ("disk0".try_into().unwrap(), "virtio-blk".try_into().unwrap());
    DeviceDescription { id, kind, version: 1, features: 0, config: Vec::new() }.with_config(config).unwrap()
}

#[derive(Clone, Copy, Default)]
struct Kind {
    readonly: bool,
    direct: bool,
    plain: bool,
}

fn machine(kind: Kind) -> Machine {
    let (folder, path) = image(SECTORS);
    let Kind { readonly, direct, plain } = kind;
    let opened = DiskBackend { readonly, direct, ..backend(&path) }.open().unwrap();
    on(Block { plain, ..Block::new(&describe(&config(readonly)), opened).unwrap() }, path, folder)
}

/// A machine whose driver uses this disk.
fn on(block: Block, path: PathBuf, folder: TempDir) -> Machine {
    let driver = Driver::new(&Arc::new(GuestRam::new(RAM).unwrap()), 0, 128, 0);
    let (activation, notified) = activation(&[&driver], block.features());
    block.activate(activation).unwrap();
    block.resume();
    Machine { block, driver, notified, path, _folder: folder }
}

fn write_header(driver: &Driver, kind: u32, sector: u64) {
    let memory = driver.ram.memory();
    memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
    memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
    memory.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
}

impl Machine {
    fn write_header(&self, kind: u32, sector: u64) {
        write_header(&self.driver, kind, sector);
    }

    fn offer(&mut self, kind: u32, sector: u64, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> (u8, u32) {
        self.write_header(kind, sector);
        let readable = [&[(HEADER, 16)], readable].concat();
        let writable = [writable, &[(STATUS, 1)]].concat();
        self.driver.add(&readable, &writable);
        self.driver.kick();
        let (_, written) = self.driver.used().expect("an answer");
        (self.driver.ram.memory().read_obj(GuestAddress(STATUS)).unwrap(), written)
    }

    fn set(&self, address: u64, bytes: &[u8]) {
        self.driver.ram.memory().write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.driver.ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn on_disk(&self, sector: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        std::fs::File::open(&self.path).unwrap().read_exact_at(&mut bytes, sector * SECTOR).unwrap();
        bytes
    }

    fn segment(&self, sector: u64, sectors: u32, flags: u32) {
        self.set(DATA, &[&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat());
    }
}

fn kinds() -> [Kind; 4] {
    let kind = Kind::default();
    [kind, Kind { plain: true, ..kind }, Kind { direct: true, ..kind }, Kind { direct: true, plain: true, ..kind }]
}

#[test]
fn what_is_written_is_on_the_disk_and_what_is_read_is_logged() {
    for kind in kinds() {
        let mut machine = machine(kind);
        machine.set(DATA + 3, &[0xa5; 1024]);
        assert_eq!(machine.offer(1, 7, &[(DATA + 3, 500), (DATA + 503, 524)], &[]), (OK, 1));
        assert_eq!(machine.on_disk(7, 1024), [0xa5; 1024]);
        assert_eq!(machine.on_disk(9, 512), [0xd1; 512]);
        assert_eq!(machine.offer(4, 0, &[], &[]), (OK, 1), "flush");

        machine.driver.ram.take_own_writes();
        let (first, second) = (DATA + 0x2_0000, DATA + 0x3_0ff0);
        assert_eq!(machine.offer(0, 6, &[], &[(first, 1000), (second, 1048)]), (OK, 2049));
        let read = [machine.get(first, 1000), machine.get(second, 1048)].concat();
        assert_eq!(read, [&[0xd1; 512][..], &[0xa5; 1024], &[0xd1; 512]].concat());
        let logged = machine.driver.ram.take_own_writes();
        for page in [first >> 12, second >> 12, (second >> 12) + 1] {
            assert!(logged.runs().any(|run| run.contains(&RamPage(page))), "page {page:#x} was written by the kernel");
        }
    }
}

#[test]
fn a_disk_says_who_it_is_and_how_large() {
    let mut machine = machine(Kind::default());
    assert_eq!(machine.offer(8, 0, &[], &[(DATA, 20)]), (OK, 21));
    assert_eq!(machine.get(DATA, 20), b"a-serial-number-that");
    let mut bytes = [0; 8];
    machine.block.read_config(0, &mut bytes);
    assert_eq!(u64::from_le_bytes(bytes), SECTORS);
    machine.block.read_config(56, &mut bytes);
    assert_eq!(bytes, [1, 0, 0, 0, 0, 0, 0, 0], "and zeros behind the end");
}

#[test]
fn what_is_discarded_is_a_hole_and_what_is_zeroed_zeros() {
    for kind in kinds() {
        let mut machine = machine(kind);
        machine.segment(8, 8, 0);
        assert_eq!(machine.offer(11, 0, &[(DATA, 16)], &[]), (OK, 1));
        assert_eq!(machine.on_disk(8, 4096), [0; 4096]);
        machine.segment(101, 3, 1);
        assert_eq!(machine.offer(13, 0, &[(DATA, 16)], &[]), (OK, 1));
        assert_eq!(machine.on_disk(100, 512 * 5), [vec![0xd1; 512], vec![0; 512 * 3], vec![0xd1; 512]].concat());
    }
}

#[test]
fn what_cannot_be_is_refused_and_the_disk_goes_on() {
    let mut machine = machine(Kind::default());
    assert_eq!(machine.offer(0, SECTORS - 1, &[], &[(DATA, 1024)]), (IOERR, 1), "behind the end");
    assert_eq!(machine.offer(0, u64::MAX, &[], &[(DATA, 512)]), (IOERR, 1), "a sector that overflows");
    assert_eq!(machine.offer(1, 0, &[(DATA, 511)], &[]), (IOERR, 1), "no whole sector");
    assert_eq!(machine.offer(99, 0, &[], &[]), (UNSUPPORTED, 1), "an unknown type");
    assert_eq!(machine.offer(8, 0, &[], &[(DATA, 19)]), (IOERR, 1), "no room for a serial number");
    machine.segment(SECTORS - 1, 2, 0);
    assert_eq!(machine.offer(11, 0, &[(DATA, 16)], &[]), (IOERR, 1), "a range behind the end");
    machine.segment(0, 1, 2);
    assert_eq!(machine.offer(13, 0, &[(DATA, 16)], &[]), (UNSUPPORTED, 1), "an unknown flag");
    assert_eq!(machine.offer(11, 0, &[(DATA, 15)], &[]), (IOERR, 1), "half a range");
    assert_eq!(machine.offer(1, 0, &[], &[]), (OK, 1), "nothing to write");
    assert_eq!(machine.on_disk(0, 512), [0xd1; 512]);
    assert!(machine.notified.faults().is_empty());
}

#[test]
fn a_disk_for_reading_is_not_written() {
    let mut machine = machine(Kind { readonly: true, ..Kind::default() });
    assert_eq!(machine.block.features() >> VIRTIO_BLK_F_RO & 1, 1);
    assert_eq!(machine.offer(1, 0, &[(DATA, 512)], &[]), (IOERR, 1));
    machine.segment(0, 8, 0);
    assert_eq!(machine.offer(11, 0, &[(DATA, 16)], &[]), (IOERR, 1));
    assert_eq!(machine.offer(0, 0, &[], &[(DATA, 512)]), (OK, 513));
}

#[test]
fn requests_without_header_or_place_for_a_status_end_in_a_fault() {
    for (readable, writable, words) in [
        (&[(HEADER, 15)][..], &[(STATUS, 1)][..], "no whole header"),
        (&[(HEADER, 16)], &[], "no place for a status"),
        (&[], &[(STATUS, 1)], "no whole header"),
    ] {
        let mut machine = machine(Kind::default());
        machine.driver.add(readable, writable);
        machine.driver.kick();
        let fault = machine.notified.fault().unwrap();
        assert!(fault.contains(words), "{fault}");
    }
}

#[test]
fn an_image_that_has_become_shorter_is_an_error_for_the_guest_alone() {
    let mut machine = machine(Kind::default());
    let file = std::fs::OpenOptions::new().write(true).open(&machine.path).unwrap();
    file.set_len(10 * SECTOR).unwrap();
    assert_eq!(machine.offer(0, 9, &[], &[(DATA, 1024)]).0, IOERR, "half of it is there");
    assert_eq!(machine.offer(0, 9, &[], &[(DATA, 512)]), (OK, 513));
}

#[test]
fn requests_are_answered_before_a_disk_rests_and_go_on_afterwards() {
    let mut machine = machine(Kind::default());
    for n in 0..30 {
        machine.write_header(0, n);
        machine.driver.add(&[(HEADER, 16)], &[(DATA + n * 512, 512), (STATUS, 1)]);
    }
    machine.driver.kick();
    machine.block.pause(Instant::now() + LIMIT).unwrap();
    let mut answered = 0;
    while machine.driver.try_used().is_some() {
        answered += 1;
    }
    machine.block.resume();
    while answered < 30 {
        machine.driver.used().unwrap();
        answered += 1;
    }
}

#[test]
fn an_image_is_one_processs() {
    let (folder, path) = image(8);
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(backend(&path).is_same_image(&backend(&link)) && !backend(&path).is_same_image(&backend(Path::new("x"))));
    let first = backend(&path).open().unwrap();
    let refused = backend(&path).open().unwrap_err().to_string();
    assert!(refused.contains("in use"), "{refused}");
    drop(first);
    let reading = DiskBackend { readonly: true, ..backend(&path) };
    let (_one, _two) = (reading.open().unwrap(), reading.open().unwrap());
    assert!(matches!(backend(&path).open(), Err(ImageError::Locked(_))));
}

#[test]
fn images_that_are_no_disks_are_refused_with_what_to_do() {
    let (folder, path) = image(8);
    let says = |path: &Path, words: &str| {
        let why = backend(path).open().unwrap_err().to_string();
        assert!(why.contains(words), "{why}");
    };
    says(&folder.path().join("missing"), "truncate");
    says(folder.path(), "neither a file nor a block device");
    says(Path::new("/dev/null"), "neither a file nor a block device");
    std::fs::write(&path, [0; 513]).unwrap();
    says(&path, "513 bytes");
    std::fs::write(&path, []).unwrap();
    says(&path, "is empty");
    std::fs::write(&path, [&b"QFI\xfb"[..], &[0; 508]].concat()).unwrap();
    says(&path, "qemu-img convert");
    DiskBackend { is_raw: true, ..backend(&path) }.open().unwrap();
}

#[test]
fn an_image_of_another_size_is_another_disk() {
    let (_folder, path) = image(8);
    let refused = Block::new(&describe(&config(false)), backend(&path).open().unwrap()).unwrap_err().to_string();
    assert!(refused.contains("has 256 sectors") && refused.contains("has 8"), "{refused}");
    let coarse = Image { alignment: 4096, ..backend(&image(SECTORS).1).open().unwrap() };
    let refused = Block::new(&describe(&config(false)), coarse).unwrap_err().to_string();
    assert!(refused.contains("leave out direct"), "{refused}");
    let zero = BlockConfig { queues: 0, ..config(false) };
    assert!(Block::new(&describe(&zero), backend(&path).open().unwrap()).is_err());
}

#[derive(Clone, Debug)]
struct Access {
    writes: bool,
    sector: u64,
    sectors: u64,
    /// Where the data is cut into two buffers, and how far it is from a page's start.
    cut: u64,
    shift: u64,
}

fn accesses() -> impl Strategy<Value = Vec<Access>> {
    let access = (any::<bool>(), 0..SECTORS + 2, 0..12_u64, 0..6000_u64, 0..5000_u64);
    let access =
        access.prop_map(|(writes, sector, sectors, cut, shift)| Access { writes, sector, sectors, cut, shift });
    prop::collection::vec(access, 1..16)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn a_disk_is_as_an_array_of_bytes(accesses in accesses(), direct in any::<bool>(), plain in any::<bool>()) {
        let mut machine = machine(Kind { direct, plain, readonly: false });
        let mut naive = vec![0xd1; (SECTORS * SECTOR) as usize];
        for (number, Access { writes, sector, sectors, cut, shift }) in accesses.into_iter().enumerate() {
            let (start, length) = (DATA + shift, sectors * SECTOR);
            let cut = cut.min(length);
            let buffers = [(start, cut as u32), (start + cut, (length - cut) as u32)];
            let fits = sector + sectors <= SECTORS;
            let range = (sector * SECTOR) as usize..((sector + sectors) * SECTOR) as usize;
            let status = if writes {
                let bytes = vec![number as u8; length as usize];
                machine.set(start, &bytes);
                if fits {
                    naive[range].copy_from_slice(&bytes);
                }
                machine.offer(1, sector, &buffers, &[]).0
            } else {
                let status = machine.offer(0, sector, &[], &buffers).0;
                if fits {
                    prop_assert_eq!(machine.get(start, length as usize), &naive[range]);
                }
                status
            };
            prop_assert_eq!(status, if fits { OK } else { IOERR });
        }
        prop_assert_eq!(machine.on_disk(0, naive.len()), naive);
    }

    #[test]
    fn nothing_that_a_guest_offers_does_harm(
        raw in prop::collection::vec((0..RAM + 9999, 0..70_000_u32, 0..4_u16, 0..9_u16), 1..12), kind in 0..14_u32) {
        let mut machine = machine(Kind::default());
        machine.write_header(kind, 1);
        for (address, length, flags, next) in raw {
            machine.driver.write_descriptor(next % 8, (address, length, flags, next));
            machine.driver.offer(next % 8);
            machine.driver.kick();
        }
        machine.block.pause(Instant::now() + LIMIT).unwrap();
        prop_assert_eq!(std::fs::metadata(&machine.path).unwrap().len(), SECTORS * SECTOR);
    }
}
