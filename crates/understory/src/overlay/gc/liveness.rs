//! Who is alive: reachability over one snapshot of the database, as pure functions.
//!
//! A live path keeps its references; with `keep-derivations` its deriver too, with `keep-outputs` a derivation its
//! statically known outputs (`gc.cc` and `computeFSClosure` of Nix 2.34.8). What nothing keeps is dead. Only rows
//! count: a path of a lower that is no row is nobody's concern here.
//!
//! Cost: 8 bytes an edge and a hash table of the paths; time linear in rows and edges.

use crate::local::db::Graph;
use std::collections::HashMap;
use understory_nix::StorePath;

/// Settings of Nix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rules {
    /// `keep-derivations`.
    pub(super) keep_derivations: bool,
    /// `keep-outputs`.
    pub(super) keep_outputs: bool,
}

/// What is alive in a snapshot, so far.
pub(super) struct Liveness {
    graph: Graph,
    index: HashMap<StorePath, u32>,
    /// Edges that the rules add to references: deriver of an output, output of a derivation.
    soft: HashMap<u32, Vec<u32>>,
    alive: Vec<bool>,
}

impl Liveness {
    /// Nothing is alive yet.
    pub(super) fn new(graph: Graph, rules: Rules) -> Self {
        let index: HashMap<StorePath, u32> = (0..)
            .zip(&graph.nodes)
            .map(|(i, node)| (node.path.clone(), i))
            .collect();
        let mut soft: HashMap<u32, Vec<u32>> = HashMap::new();
        let mut add = |from: u32, to: Option<&u32>| {
            if let Some(&to) = to
                && to != from
            {
                soft.entry(from).or_default().push(to);
            }
        };
        if rules.keep_derivations {
            for (i, node) in (0..).zip(&graph.nodes) {
                add(i, node.deriver.as_ref().and_then(|drv| index.get(drv)));
            }
        }
        if rules.keep_outputs {
            for (drv, output) in &graph.outputs {
                add(*drv, index.get(output));
            }
        }
        Self {
            alive: vec![false; graph.nodes.len()],
            graph,
            index,
            soft,
        }
    }

    /// The row of a path.
    pub(super) fn find(&self, path: &StorePath) -> Option<u32> {
        self.index.get(path).copied()
    }
    /// The path of a row.
    pub(super) fn path(&self, row: u32) -> &StorePath {
        &self.graph.nodes[row as usize].path
    }
    /// All rows.
    pub(super) fn rows(&self) -> std::ops::Range<u32> {
        0..u32::try_from(self.graph.nodes.len()).unwrap_or(u32::MAX)
    }
    /// True if something that was marked keeps it.
    pub(super) fn is_alive(&self, row: u32) -> bool {
        self.alive[row as usize]
    }
    /// Marks a row and all that it keeps.
    pub(super) fn mark(&mut self, row: u32) {
        let mut open = vec![row];
        while let Some(row) = open.pop() {
            if !std::mem::replace(&mut self.alive[row as usize], true) {
                open.extend(self.kept_by(row));
            }
        }
    }
    /// All dead rows.
    pub(super) fn dead(&self) -> Vec<u32> {
        self.rows().filter(|row| !self.is_alive(*row)).collect()
    }

    /// The dead ones of `wanted` that may go without anything else: whatever keeps one is among them.
    pub(super) fn dead_among(&self, wanted: &[u32]) -> Vec<u32> {
        let mut going = self.as_flags(wanted);
        let mut staying: Vec<u32> = self.rows().filter(|row| !going[*row as usize]).collect();
        while let Some(row) = staying.pop() {
            for kept in self.kept_by(row) {
                if std::mem::replace(&mut going[kept as usize], false) {
                    staying.push(kept);
                }
            }
        }
        self.of_flags(&going)
    }
    /// The dead ones of `wanted` with everything that keeps them, directly or not.
    pub(super) fn dead_with_keepers(&self, wanted: &[u32]) -> Vec<u32> {
        let mut keepers: Vec<Vec<u32>> = vec![Vec::new(); self.graph.nodes.len()];
        for row in self.rows().filter(|row| !self.is_alive(*row)) {
            for kept in self.kept_by(row) {
                keepers[kept as usize].push(row);
            }
        }
        let mut going = self.as_flags(wanted);
        let mut open = self.of_flags(&going);
        while let Some(row) = open.pop() {
            for &keeper in &keepers[row as usize] {
                if !std::mem::replace(&mut going[keeper as usize], true) {
                    open.push(keeper);
                }
            }
        }
        self.of_flags(&going)
    }

    /// Orders `rows` so that each comes after those that keep it. Where derivations and outputs keep each other, only
    /// references decide, as the database demands.
    pub(super) fn referrers_first(&self, rows: &[u32]) -> Vec<u32> {
        let mut open = vec![false; self.graph.nodes.len()];
        for row in rows {
            open[*row as usize] = true;
        }
        let mut order = Vec::with_capacity(rows.len());
        self.sort(rows, &mut open, &mut order, |row| self.kept_by(row));
        self.sort(rows, &mut open, &mut order, |row| self.references(row));
        // A cycle of references, which Nix does not register: together they can go all the same.
        order.extend(rows.iter().filter(|row| open[**row as usize]));
        order
    }

    /// Kahn's algorithm over those of `rows` that are `open`; what is ordered is not open any more.
    fn sort<I: Iterator<Item = u32>>(
        &self,
        rows: &[u32],
        open: &mut [bool],
        order: &mut Vec<u32>,
        edges: impl Fn(u32) -> I,
    ) {
        let mut keepers = vec![0_u32; open.len()];
        for &row in rows.iter().filter(|row| open[**row as usize]) {
            for kept in edges(row) {
                keepers[kept as usize] += 1;
            }
        }
        let free = |row: &u32, open: &[bool], keepers: &[u32]| {
            open[*row as usize] && keepers[*row as usize] == 0
        };
        let mut ready: Vec<u32> = rows
            .iter()
            .copied()
            .filter(|row| free(row, open, &keepers))
            .collect();
        while let Some(row) = ready.pop() {
            if !std::mem::replace(&mut open[row as usize], false) {
                continue;
            }
            order.push(row);
            for kept in edges(row) {
                keepers[kept as usize] -= 1;
                if free(&kept, open, &keepers) {
                    ready.push(kept);
                }
            }
        }
    }

    /// What a row refers to, without itself.
    pub(super) fn references(&self, row: u32) -> impl Iterator<Item = u32> + '_ {
        self.graph.nodes[row as usize].references.iter().copied()
    }
    fn kept_by(&self, row: u32) -> impl Iterator<Item = u32> + '_ {
        let soft = self.soft.get(&row).map_or(&[][..], Vec::as_slice);
        self.references(row).chain(soft.iter().copied())
    }
    /// The dead ones of `rows`.
    fn as_flags(&self, rows: &[u32]) -> Vec<bool> {
        let mut flags = vec![false; self.graph.nodes.len()];
        for row in rows.iter().filter(|row| !self.is_alive(**row)) {
            flags[*row as usize] = true;
        }
        flags
    }
    fn of_flags(&self, flags: &[bool]) -> Vec<u32> {
        self.rows().filter(|row| flags[*row as usize]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::db::GraphNode;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn path(n: usize) -> StorePath {
        StorePath::from_base_name(&format!("{n:032}-x")).unwrap()
    }

    /// References go to smaller numbers only, as in a store without cycles; derivers and outputs go anywhere.
    fn graphs() -> impl Strategy<Value = (Graph, Vec<u32>, Vec<u32>)> {
        (1_usize..24).prop_flat_map(|count| {
            let some = || prop::collection::vec(0..count as u32, 0..count);
            let node = (some(), prop::option::weighted(0.3, 0..count + 2));
            let outputs = prop::collection::vec((0..count as u32, 0..count + 2), 0..count);
            (prop::collection::vec(node, count), outputs, some(), some()).prop_map(
                |(nodes, outputs, roots, wanted)| {
                    let nodes = (0_u32..)
                        .zip(nodes)
                        .map(|(i, (references, deriver))| GraphNode {
                            path: path(i as usize),
                            deriver: deriver.map(path),
                            references: references.into_iter().filter(|r| *r < i).collect(),
                        })
                        .collect();
                    let outputs = outputs.into_iter().map(|(d, o)| (d, path(o))).collect();
                    (Graph { nodes, outputs }, roots, wanted)
                },
            )
        })
    }

    /// All (keeper, kept) pairs, straight from the rules.
    fn edges(graph: &Graph, rules: Rules) -> BTreeSet<(u32, u32)> {
        let mut edges = BTreeSet::new();
        for (i, node) in (0..).zip(&graph.nodes) {
            edges.extend(node.references.iter().map(|r| (i, *r)));
            for (j, other) in (0..).zip(&graph.nodes) {
                if rules.keep_derivations && node.deriver.as_ref() == Some(&other.path) {
                    edges.insert((i, j));
                }
                if rules.keep_outputs && graph.outputs.contains(&(i, other.path.clone())) {
                    edges.insert((i, j));
                }
            }
        }
        edges.retain(|(from, to)| from != to);
        edges
    }
    /// Grows `set` along `edges` until nothing changes.
    fn closure(mut set: BTreeSet<u32>, edges: impl Fn(u32) -> Vec<u32>) -> BTreeSet<u32> {
        loop {
            let more: BTreeSet<u32> = set.iter().flat_map(|row| edges(*row)).collect();
            let before = set.len();
            set.extend(more);
            if set.len() == before {
                return set;
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn agrees_with_a_naive_model(
            (graph, roots, wanted) in graphs(), keep_derivations: bool, keep_outputs: bool
        ) {
            let rules = Rules { keep_derivations, keep_outputs };
            let edges = edges(&graph, rules);
            let hard: Vec<(u32, u32)> = (0..)
                .zip(&graph.nodes)
                .flat_map(|(i, node)| node.references.iter().map(move |r| (i, *r)))
                .collect();
            let kept = |row: u32| edges.iter().filter(|e| e.0 == row).map(|e| e.1).collect();
            let keepers = |row: u32| -> Vec<u32> {
                edges.iter().filter(|e| e.1 == row).map(|e| e.0).collect()
            };
            let alive = closure(roots.iter().copied().collect(), kept);
            let all: BTreeSet<u32> = (0..graph.nodes.len() as u32).collect();
            let dead: BTreeSet<u32> = all.difference(&alive).copied().collect();
            let wanted: BTreeSet<u32> = wanted.into_iter().collect();
            let wanted_dead: BTreeSet<u32> = wanted.intersection(&dead).copied().collect();

            let mut liveness = Liveness::new(graph, rules);
            for root in roots {
                liveness.mark(root);
            }
            prop_assert_eq!(liveness.dead().into_iter().collect::<BTreeSet<_>>(), dead.clone());

            let wanted: Vec<u32> = wanted.into_iter().collect();
            // Nix's rule: everything that reaches it must be wanted and dead.
            let alone: Vec<u32> = wanted_dead
                .iter()
                .copied()
                .filter(|row| closure([*row].into(), keepers).is_subset(&wanted_dead))
                .collect();
            prop_assert_eq!(liveness.dead_among(&wanted), alone);
            let with: Vec<u32> = closure(wanted_dead, keepers).into_iter().collect();
            prop_assert_eq!(liveness.dead_with_keepers(&wanted), with.clone());
            prop_assert!(with.iter().all(|row| dead.contains(row)));

            let rows: Vec<u32> = dead.into_iter().collect();
            let order = liveness.referrers_first(&rows);
            prop_assert_eq!(order.iter().copied().collect::<BTreeSet<_>>(), rows.iter().copied().collect());
            prop_assert_eq!(order.len(), rows.len());
            let at = |row: u32| order.iter().position(|r| *r == row);
            for (referrer, reference) in hard {
                if let (Some(one), Some(two)) = (at(referrer), at(reference)) {
                    prop_assert!(one < two);
                }
            }
        }
    }

    #[test]
    fn an_output_goes_before_its_derivation() {
        let node = |n, deriver: Option<usize>| GraphNode {
            path: path(n),
            deriver: deriver.map(path),
            references: Vec::new(),
        };
        let graph = Graph {
            nodes: vec![node(0, None), node(1, Some(0)), node(2, Some(0))],
            outputs: Vec::new(),
        };
        let rules = Rules {
            keep_derivations: true,
            keep_outputs: false,
        };
        let liveness = Liveness::new(graph, rules);
        assert_eq!(liveness.referrers_first(&[0, 1, 2]).last(), Some(&0));
    }
}
