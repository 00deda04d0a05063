// Package unixpeer finds out in which pod the process is that connected to a unix socket: from the socket to the process,
// from the process to its control group, from that to the pod's UID.
//
// The process that connected is held by a pidfd, which the kernel keeps with the socket (SO_PEERPIDFD, Linux 6.5). A
// process that has ended is refused, and one that ends while it is looked at too, so that a process id that was used again
// leads nobody to another's pod. Where the kernel keeps no pidfd the number alone is left, and it is believed only of a
// process that is older than the connection can be: see [Listener].
//
// The control group's path is read from its root on, by a closed grammar; what a pod makes below its own container is not
// looked at, whatever its name. The pod's UID is all that comes out: whether there is such a pod, on this node, and what it
// may have, is for whoever knows the cluster.
package unixpeer

// Invisible is what a refusal turns on (refusal.Error.Claim) that each peer would meet: the agent does not see the node's
// processes.
const Invisible = "hostPID"
