package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"time"
)

// The node's addresses, as in etc/addresses.
const (
	nodeName   = "node1"
	nodeIP     = "10.99.0.1" // kubelet refuses one of loopback
	apiAddress = nodeIP + ":443"

	containerdSocket = "/run/containerd/containerd.sock"
	etcdURL          = "http://127.0.0.1:2379"
	etcdPeerURL      = "http://127.0.0.1:2380"

	pki   = dir + "/pki"
	gates = "--feature-gates=PodCertificateRequest=true,ClusterTrustBundle=true,ClusterTrustBundleProjection=true"
)

// program is one of the node's.
type program struct {
	// path is bin/NAME where it is empty.
	path string
	args []string
	// ready tells whether it does what others need; nil where none waits for it.
	ready func(context.Context) error
}

// programs are those that every node has.
var programs = map[string]program{
	"etcd": {
		args: []string{
			"--data-dir=" + dir + "/etcd", "--unsafe-no-fsync", "--log-level=warn",
			"--listen-client-urls=" + etcdURL, "--advertise-client-urls=" + etcdURL,
			"--listen-peer-urls=" + etcdPeerURL, "--initial-advertise-peer-urls=" + etcdPeerURL, "--initial-cluster=default=" + etcdPeerURL,
		},
	},
	"containerd": {
		args:  []string{"--config=" + dir + "/etc/containerd.toml"},
		ready: listens("unix", containerdSocket),
	},
	"kube-apiserver": {
		args: []string{
			"--etcd-servers=" + etcdURL, "--cert-dir=" + pki + "/generated", "--bind-address=0.0.0.0", "--secure-port=443",
			"--advertise-address=" + nodeIP, "--service-cluster-ip-range=10.96.0.0/24",
			"--tls-cert-file=" + pki + "/apiserver.crt", "--tls-private-key-file=" + pki + "/apiserver.key", "--client-ca-file=" + pki + "/ca.crt",
			"--kubelet-preferred-address-types=InternalIP", "--kubelet-certificate-authority=" + pki + "/ca.crt",
			"--kubelet-client-certificate=" + pki + "/kubelet-client.crt", "--kubelet-client-key=" + pki + "/kubelet-client.key",
			"--service-account-issuer=https://kubernetes.default.svc",
			"--service-account-key-file=" + pki + "/sa.key", "--service-account-signing-key-file=" + pki + "/sa.key",
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
			"--runtime-config=certificates.k8s.io/v1beta1=true", gates,
		},
		ready: answersReadyz,
	},
	"kube-controller-manager": {
		args: []string{
			"--kubeconfig=" + pki + "/system-kube-controller-manager.kubeconfig", "--bind-address=127.0.0.1", "--leader-elect=false",
			"--service-account-private-key-file=" + pki + "/sa.key", "--root-ca-file=" + pki + "/ca.crt",
			"--use-service-account-credentials=true", "--kube-api-qps=200", "--kube-api-burst=400", gates,
		},
	},
	"kube-scheduler": {
		args: []string{"--kubeconfig=" + pki + "/system-kube-scheduler.kubeconfig", "--bind-address=127.0.0.1", "--leader-elect=false"},
	},
	"kubelet": {
		args: []string{
			"--config=" + dir + "/etc/kubelet.yaml", "--kubeconfig=" + pki + "/system-node-" + nodeName + ".kubeconfig",
			"--hostname-override=" + nodeName, "--node-ip=" + nodeIP,
		},
	},
	"kube-proxy": {
		args: []string{"--config=" + dir + "/etc/kube-proxy.yaml"},
	},
	"coredns": {
		args: []string{"-conf=" + dir + "/etc/Corefile"},
	},
}

func listens(network, address string) func(context.Context) error {
	return func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err != nil {
			return err
		}
		return conn.Close()
	}
}

// answersReadyz asks for no more than anybody may know, so it need not know whom it speaks to.
func answersReadyz(ctx context.Context) error {
	client := &http.Client{
		Timeout: 2 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			TLSClientConfig:   &tls.Config{InsecureSkipVerify: true},
		},
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+apiAddress+"/readyz", nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("/readyz: %s", answer.Status)
	}
	return nil
}
