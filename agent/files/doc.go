// Package files delivers what a workload is served as files: key, chain and trust bundle under the names that their
// readers expect, for what cannot speak SDS.
//
//   - names: which names, and what stands in each file.
//   - config, options: what one directory is to be, as an agent's configuration and as a volume's attributes say it.
//   - directory, swap: all files of a change appear at once, as kubelet's do, and no name that somebody else put there is
//     ever followed.
//   - keep: the loop from Materials to files, and what it shows of itself.
//   - hook, tell: the signal, command or HTTP request that tells a process to read them again.
//   - source, volumes: the loop for an agent's own workloads, and for volumes of pods.
//
// A bundle counts as taken when its files are written and, where there is a hook, when that succeeded.
package files
