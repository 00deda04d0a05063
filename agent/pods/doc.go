// Package pods serves pods that have no volume of the CSI driver at one socket that they share. Whoever connects is attested
// by the kernel's word: which process it is, and in which pod. That pod becomes a workload of the agent, which vouches for it
// at the CA by its UID; the CA must know that very pod on this node, and policy must have opened that way for it
// (nodeVouched). The agent itself asks no API server: what the cluster knows, the CA knows.
//
// A pod's workload lasts as long as the pod, or until nobody has been connected for a while.
package pods
