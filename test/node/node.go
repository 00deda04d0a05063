// Package node runs a real Kubernetes node for tests and for people: etcd, kube-apiserver, controller-manager, scheduler,
// containerd, kubelet, a network for pods, Services and DNS, with everything that a cluster has to offer to meshca (CSI
// drivers, tokens for pods, PodCertificateRequests, ClusterTrustBundles).
//
// It lives in namespaces of its own (mounts, network, processes, cgroups). Nothing of the machine's is changed but a
// folder and a cgroup, both called meshca-node-…, which go with the node; where the program that started it was killed,
// the node is gone at once, and the next start takes those two away. There is no way from it to the network outside;
// what stands in front of the API server's address here, on loopback, leads in.
//
// What it does not have: network policies are accepted and not enforced; there is no registry, images come from files.
package node

import (
	"bytes"
	"context"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/test/kube"
	"github.com/meshca/meshca/test/parts"
)

const (
	// Name is the node's.
	Name = "node1"
	// addresses that inside/etc/addresses gives it.
	address, serviceAddress = "10.99.0.1", "10.96.0.1"

	launchLimit = 2 * time.Minute
	namespaces  = syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET
)

// Node is a running one. Its Admin reaches the API server from here.
type Node struct {
	kube.Admin
	// Took is the time from the start of its first process until it was Ready.
	Took time.Duration

	place   *place
	process *parts.Process
	control *http.Client
}

// Launch starts a node and returns when it is Ready. It is ended by Close, and by the end of this program.
func Launch(ctx context.Context) (*Node, error) {
	if missing := Missing(); len(missing) > 0 {
		return nil, fmt.Errorf("a Kubernetes node cannot run here: %s", strings.Join(missing, "; "))
	}
	ctx, cancel := context.WithTimeout(ctx, launchLimit)
	defer cancel()
	if err := sweep(os.TempDir()); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	p, err := claim(os.TempDir())
	if err != nil {
		return nil, err
	}
	n := &Node{place: p}
	n.control = &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(p.dir, "control.sock"))
		},
	}}
	if err := n.launch(ctx); err != nil {
		kept, problem := n.keepLogs("launch")
		return nil, errors.Join(fmt.Errorf("starting a Kubernetes node: %w; what its programs printed is in %s", err, kept), problem, n.Close())
	}
	return n, nil
}

func (n *Node) launch(ctx context.Context) error {
	dir := n.place.dir
	for _, folder := range []string{"pki", "logs", "lib", "log"} {
		if err := os.Mkdir(filepath.Join(dir, folder), 0o755); err != nil {
			return err
		}
	}
	if err := build(ctx, filepath.Join(dir, "inside"), "./test/node/inside"); err != nil {
		return err
	}
	bin, err := binaries()
	if err != nil {
		return err
	}
	door, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer door.Close()
	kubeconfig, err := writePKI(filepath.Join(dir, "pki"), "https://"+door.Addr().String())
	if err != nil {
		return err
	}
	if err := n.place.makeCgroups(); err != nil {
		return err
	}
	began := time.Now()
	if err := n.run(ctx, bin, door); err != nil {
		return err
	}
	if n.Admin, err = kube.NewAdmin(kubeconfig); err != nil {
		return err
	}
	tool, err := Tool(ctx, dir)
	if err != nil {
		return err
	}
	pause := Image{Name: "localhost/pause:1", Entrypoint: []string{"/inpod", "pause"}, Files: tool.Files}
	if err := errors.Join(n.Import(ctx, pause), n.Import(ctx, tool)); err != nil {
		return err
	}
	if err := n.Await(ctx, "the node to be Ready", n.ready); err != nil {
		return fmt.Errorf("%w; %s", err, n.process.Output())
	}
	n.Took = time.Since(began)
	return nil
}

// run starts the first process and waits until all programs run.
func (n *Node) run(ctx context.Context, bin string, door net.Listener) error {
	listener, ok := door.(*net.TCPListener)
	if !ok {
		return fmt.Errorf("a TCP listener was wanted, not %T", door)
	}
	file, err := listener.File()
	if err != nil {
		return err
	}
	defer file.Close()
	log, err := os.Create(filepath.Join(n.place.dir, "logs", "node.log"))
	if err != nil {
		return err
	}
	n.process, err = parts.Start(parts.Command{
		Path: filepath.Join(n.place.dir, "inside"), Args: []string{"namespaces", n.place.dir, bin}, Dir: "/",
		Env: []string{"PATH=" + searchPath(), "HOME=/root"}, Log: log, Files: []*os.File{file}, Namespaces: namespaces,
	})
	if err != nil {
		return errors.Join(err, log.Close())
	}
	go func() {
		<-n.process.Done()
		log.Close()
	}()
	return n.process.Await(ctx, func(ctx context.Context) error { return n.ask(ctx, http.MethodGet, "/ready") })
}

// ready waits for what every pod needs: a node to run on and a service account.
func (n *Node) ready(ctx context.Context) error {
	node, err := n.Clientset.CoreV1().Nodes().Get(ctx, Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, condition := range node.Status.Conditions {
		if condition.Type == corev1.NodeReady && condition.Status != corev1.ConditionTrue {
			return errors.New(condition.Message)
		}
	}
	if len(node.Status.Conditions) == 0 || len(node.Spec.Taints) > 0 {
		return fmt.Errorf("it has taints: %v", node.Spec.Taints)
	}
	_, err = n.Clientset.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
	return err
}

// Close ends the node and takes away all of it.
func (n *Node) Close() error {
	if n.process != nil {
		n.process.Kill() // process 1: the kernel ends all others with it
	}
	return n.place.remove()
}

// AddProgram adds a program to those of the node, as an administrator does with a unit of systemd; StartProgram starts it.
// The binary is a path of the node's: what is in Dir is found at Inner.
func (n *Node) AddProgram(ctx context.Context, program, binary string, args ...string) error {
	unit, err := json.Marshal(map[string]any{"path": binary, "args": args})
	if err != nil {
		return err
	}
	return n.tell(ctx, http.MethodPost, "/"+program+"/add", bytes.NewReader(unit))
}

// StopProgram kills one of the node's programs, as a crash would: etcd, containerd, kube-apiserver,
// kube-controller-manager, kube-scheduler, kubelet, kube-proxy, coredns, or one that was added.
func (n *Node) StopProgram(ctx context.Context, program string) error {
	return n.ask(ctx, http.MethodPost, "/"+program+"/stop")
}

// EndProgram asks one to end (SIGTERM), and returns when it has.
func (n *Node) EndProgram(ctx context.Context, program string) error {
	return n.ask(ctx, http.MethodPost, "/"+program+"/end")
}

// StartProgram starts it again.
func (n *Node) StartProgram(ctx context.Context, program string) error {
	return n.ask(ctx, http.MethodPost, "/"+program+"/start")
}

func (n *Node) ask(ctx context.Context, method, path string) error {
	return n.tell(ctx, method, path, http.NoBody)
}

func (n *Node) tell(ctx context.Context, method, path string, body io.Reader) error {
	request, err := http.NewRequestWithContext(ctx, method, "http://node"+path, body)
	if err != nil {
		return err
	}
	answer, err := n.control.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(answer.Body, 64<<10))
		return fmt.Errorf("%s: %s", path, strings.TrimSpace(string(text)))
	}
	return nil
}

// Path is where a file of the node's is to be found here: a path of the node's mounts, not of this machine's.
func (n *Node) Path(path string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", n.process.PID()), path)
}

// Logs is the folder with the logs of the node's programs.
func (n *Node) Logs() string { return filepath.Join(n.place.dir, "logs") }

// Dir is a folder that lasts as long as the node, for files that are made for it.
func (n *Node) Dir() string { return n.place.dir }

// Inner is where the node's programs find what is in Dir.
const Inner = "/run/node"

// writePKI makes what the programs show, and returns the kubeconfig of an administrator outside, where url leads in.
func writePKI(dir, url string) (string, error) {
	pki, err := kube.NewPKI(dir)
	if err != nil {
		return "", err
	}
	_, err = pki.Server("apiserver", pkix.Name{CommonName: "kube-apiserver"}, "127.0.0.1", address, serviceAddress, "kubernetes.default.svc", "localhost")
	if err != nil {
		return "", err
	}
	if _, err = pki.Server("kubelet", pkix.Name{CommonName: "system:node:" + Name, Organization: []string{"system:nodes"}}, address, Name); err != nil {
		return "", err
	}
	if _, err = pki.Client("kubelet-client", "kube-apiserver-kubelet-client", "system:masters"); err != nil {
		return "", err
	}
	for user, groups := range map[string][]string{
		"system:kube-controller-manager": nil, "system:kube-scheduler": nil, "system:kube-proxy": nil,
		"system:node:" + Name: {"system:nodes"}, "coredns": {"system:masters"},
	} {
		if _, err = pki.Kubeconfig("https://"+address, user, groups...); err != nil {
			return "", err
		}
	}
	return pki.Kubeconfig(url, "admin", "system:masters")
}
