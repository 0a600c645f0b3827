//! Which files of a store are read to measure it, and where in them: the same in every run.

/// Files up to this size are small.
pub(super) const SMALL_BYTES_MAX: u64 = 64 << 10;
/// Files from this size are read in sequence and at random.
pub(super) const LARGE_BYTES_MIN: u64 = 1 << 20;
/// What is read at a random place.
const PAGE_BYTES: u64 = 4096;

/// How much of the data a pass touches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    pub(crate) rounds: usize,
    pub(crate) small_files: usize,
    pub(crate) sequential_bytes: u64,
    pub(crate) random_reads: usize,
}

impl Scale {
    /// Shuffles large files, with their sizes, and leaves as many as are read in sequence.
    pub(super) fn choose<T>(&self, large: &mut Vec<(T, u64)>, random: &mut Random) {
        random.shuffle(large);
        let mut sum = 0;
        large.retain(|(_, size)| {
            sum += size;
            sum - size < self.sequential_bytes
        });
    }

    /// Pages of these files, as number of the file and offset in bytes.
    pub(super) fn pages<T>(&self, files: &[(T, u64)], random: &mut Random) -> Vec<(usize, u64)> {
        if files.is_empty() {
            return Vec::new();
        }
        let mut page = || {
            let file = random.below(files.len() as u64);
            let file = usize::try_from(file).unwrap_or_default();
            let pages = files[file].1 / PAGE_BYTES;
            (file, random.below(pages.max(1)) * PAGE_BYTES)
        };
        (0..self.random_reads).map(|_| page()).collect()
    }
}

/// xorshift64*: the same reads in every run.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
    pub(super) fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            let other = usize::try_from(self.below(i as u64 + 1)).unwrap_or_default();
            list.swap(i, other);
        }
    }
}
