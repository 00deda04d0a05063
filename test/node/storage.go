package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// storageClass is what claims that name none get.
const storageClass = "standard"

// Volume adds a local volume to those that claims of the default StorageClass can have. Nothing makes volumes on demand
// here, and nothing takes one away but the end of the node.
func (n *Node) Volume(ctx context.Context, name string) error {
	if err := os.MkdirAll(filepath.Join(n.place.dir, "lib", "volumes", name), 0o755); err != nil {
		return err
	}
	return n.Apply(ctx, fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: %[1]s, annotations: {storageclass.kubernetes.io/is-default-class: "true"}}
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: %[2]s}
spec:
  storageClassName: %[1]s
  capacity: {storage: 10Gi}
  accessModes: [ReadWriteOnce]
  local: {path: /var/lib/volumes/%[2]s}
  nodeAffinity:
    required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [%[3]s]}]}]}
`, storageClass, name, Name))
}
