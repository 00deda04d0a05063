package node

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/meshca/meshca/test/parts"
)

// programs are those that come with the machine, each with Debian's package.
var programs = []struct{ name, pkg string }{{"runc", "runc"}, {"nft", "nftables"}, {"ip", "iproute2"}, {"nsenter", "util-linux"}, {"ldd", "libc-bin"}}

// searchPath is the PATH with the places of the administrator's programs, which a user's leaves out.
func searchPath() string {
	return strings.Join([]string{os.Getenv("PATH"), "/usr/local/sbin", "/usr/sbin", "/sbin"}, ":")
}

// Missing says, one sentence each, what a node would need that is not here. Parts that `make parts` gets are not meant:
// where they are absent a start fails.
func Missing() []string {
	if runtime.GOOS != "linux" {
		return []string{"it runs on Linux, and this is " + runtime.GOOS}
	}
	var missing, packages []string
	for _, program := range programs {
		if _, err := lookPath(program.name); err != nil {
			missing = append(missing, program.name)
			packages = append(packages, program.pkg)
		}
	}
	var sentences []string
	if len(missing) > 0 {
		sentences = append(sentences, fmt.Sprintf("%s missing (Debian: apt-get install %s)", strings.Join(missing, ", "), strings.Join(packages, " ")))
	}
	if os.Geteuid() != 0 {
		return append(sentences, "it must be started by root")
	}
	try := exec.Command("true")
	try.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces}
	if err := try.Run(); err != nil {
		sentences = append(sentences, fmt.Sprintf("root may not make namespaces here (%v): in a container it takes --privileged", err))
	}
	return sentences
}

func lookPath(name string) (string, error) {
	for _, dir := range filepath.SplitList(searchPath()) {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
}

// binaries is the folder of the parts. They are shown to the node as a whole: it does not look on the PATH for them.
func binaries() (string, error) {
	root, err := parts.Root()
	if err != nil {
		return "", err
	}
	bin := filepath.Join(root, ".parts", "bin")
	for _, name := range []string{
		"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl", "kube-proxy", "coredns",
		"containerd", "containerd-shim-runc-v2", "ctr", "helm", "cni/bridge", "cni/host-local", "cni/loopback",
	} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			return "", fmt.Errorf("%w: run `make parts`", err)
		}
	}
	return bin, nil
}
