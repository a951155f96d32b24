"""What of the host's userland is masked where it is shown."""

from __future__ import annotations

__all__ = ["MASKED"]

# Most of it is readable by root alone, whose files belong to nobody
# in a sandbox; it is masked all the same.
MASKED = (
    # accounts and what may become root
    *(b"/etc/shadow", b"/etc/shadow-", b"/etc/gshadow", b"/etc/gshadow-", b"/etc/security/opasswd"),
    *(b"/etc/sudoers", b"/etc/sudoers.d", b"/etc/doas.conf", b"/etc/polkit-1/localauthority"),
    # keys of this machine
    *(b"/etc/ssl/private", b"/etc/pki/tls/private", b"/etc/pki/private", b"/etc/ssh", b"/etc/dropbear"),
    *(b"/etc/krb5.keytab", b"/etc/letsencrypt", b"/etc/acme", b"/etc/crypttab", b"/etc/cryptsetup-keys.d"),
    *(b"/etc/luks", b"/etc/credstore", b"/etc/credstore.encrypted", b"/etc/machine-id", b"/etc/tpm2-tss"),
    *(b"/etc/wireguard", b"/etc/openvpn", b"/etc/ipsec.secrets", b"/etc/ipsec.d", b"/etc/swanctl", b"/etc/tinc"),
    *(
        b"/etc/NetworkManager/system-connections",
        b"/etc/wpa_supplicant",
        b"/etc/iwd",
        b"/etc/ppp",
        b"/etc/chap-secrets",
    ),
    # clouds, clusters, container engines, registries
    *(b"/etc/google", b"/etc/google_cloud", b"/etc/boto.cfg", b"/etc/azure", b"/etc/waagent.conf", b"/etc/aws"),
    *(b"/etc/ecs", b"/etc/amazon", b"/etc/digitalocean", b"/etc/oracle-cloud-agent", b"/etc/cloud"),
    *(
        b"/etc/kubernetes",
        b"/etc/rancher",
        b"/etc/cni/net.d",
        b"/etc/containers/auth.json",
        b"/etc/docker",
        b"/etc/crio",
    ),
    *(b"/etc/containerd", b"/etc/vault.d", b"/etc/consul.d", b"/etc/nomad.d", b"/etc/teleport.yaml", b"/etc/etcd"),
    # services and tools with passwords in their configuration
    *(
        b"/etc/netrc",
        b"/etc/.pwd.lock",
        b"/etc/mysql/debian.cnf",
        b"/etc/postfix/sasl_passwd",
        b"/etc/exim4/passwd.client",
    ),
    *(
        b"/etc/msmtprc",
        b"/etc/davfs2/secrets",
        b"/etc/cifs-credentials",
        b"/etc/samba/credentials",
        b"/etc/rsyncd.secrets",
    ),
    *(
        b"/etc/apt/auth.conf",
        b"/etc/apt/auth.conf.d",
        b"/etc/gitlab-runner",
        b"/etc/gitlab",
        b"/etc/grafana",
        b"/etc/redis",
    ),
    *(b"/etc/restic", b"/etc/borgmatic", b"/etc/puppetlabs/puppet/ssl", b"/etc/salt/pki", b"/etc/chef", b"/etc/munge"),
)
