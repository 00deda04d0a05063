// Package csi makes workloads of pods: the agent is a CSI node driver, and a pod that has one of its ephemeral inline
// volumes gets a directory of its own with the socket of its own identity in it, before its first container starts.
//
// The pieces, each a file:
//
//   - driver: the agent.Source, and who works on which volume.
//   - register, identity: how the kubelet gets to know the driver.
//   - publish, republish, unpublish: what the kubelet asks for.
//   - request: what is read of a request, all of it bounded.
//   - volume: what a volume is on the node's disk.
//   - mount: how its directory comes into the pod.
//   - orphans: what is left of volumes that nobody asks for any more.
//   - serve, peer: the sockets, and who may call.
//
// A volume is known by what stands on the node: its state below the runtime directory, and its directory mounted at the
// kubelet's target path. Both outlive the agent. Where anything is mounted there, or was in this boot, a pod uses the
// volume, and what the kubelet then asks for is a republish, which never fails.
package csi
